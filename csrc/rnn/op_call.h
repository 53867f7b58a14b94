// What rnn_fwd and rnn_bwd are both given, checked, and kept alive while kernels read it.
#pragma once
#include "common/isa.h"
#include "common/library.h"
#include "rnn/call.h"

namespace seqkern::rnn {

inline const CpuKernels& cpu_kernels() {
  return select(generic::kernels, avx2::kernels, avx512::kernels);
}

struct Options {
  int64_t cell;
  bool reverse;
  double zoneout, recurrent_dropout;
  bool training, batch_invariant;
};

struct Call {
  Checker check{"rnn"};
  Inputs in{};
  Tensor x;
  Weights weights;
  MaybeTensor initial_h, initial_c, reset, seed;
  Packing packing;
  std::vector<Run> runs;

  Call(const Tensor& x_in, const Tensor& R, const MaybeTensor& bias, const MaybeTensor& proj,
       const MaybeTensor& initial_h_in, const MaybeTensor& initial_c_in, const MaybeTensor& reset_in,
       const MaybeTensor& cu_seqlens, const MaybeTensor& seed_in, const Options& options, Target target)
      : x(x_in), weights(checked(x_in, options), cell_given(options), x_in, R, bias, proj) {
    in.cell = cell_of(check, options.cell);
    const int64_t B = x.size(0), L = x.size(1);
    in.heads = x.size(2), in.units = x.size(4), in.outputs = weights.outputs;
    in.accumulator = accumulator(check.floating("x", x));
    packing = Packing(check, "x", x, B, L, cu_seqlens, std::nullopt);
    in.sequences = packing.sequences(B, L, options.reverse);
    in.x = gates_of(check, x);
    in.R = array(check, "R", weights.R), in.bias = array(check, "bias", weights.bias);
    in.proj = array(check, "proj", weights.proj);

    if (initial_h_in) check_h("initial_h", *initial_h_in);
    if (initial_c_in) check_c("initial_c", *initial_c_in);
    initial_h = as_contiguous(initial_h_in), initial_c = as_contiguous(initial_c_in);
    in.initial_h = array(check, "initial_h", initial_h), in.initial_c = array(check, "initial_c", initial_c);
    if (reset_in) {
      check.shape("reset", *reset_in, {{"B", B}, {"L", L}});
      if (reset_in->scalar_type() != ScalarType::Bool)
        check.fail("reset must be bool, got ", dtype_name(reset_in->scalar_type()), "; convert it with .bool()");
      check.device("reset", *reset_in, "x", x);
      reset = as_contiguous(*reset_in);
      in.reset = static_cast<const bool*>(reset->data_ptr());
    }
    set_random(options, seed_in);
    in.batch_invariant = options.batch_invariant;

    if (target == Target::kCpu) {
      runs = host_runs(check, in.sequences);
      if (reset) runs = cut_at_resets(runs, in.sequences, in.reset);
      in.runs = runs.data(), in.num_runs = static_cast<int64_t>(runs.size());
    } else {
      packing.check_values(check, in.sequences);
    }
  }

  void check_h(const char* name, const Tensor& h) const {
    check.shape(name, h, {state_rows(), {"H", in.heads}, {"Q", in.outputs}});
    check.device(name, h, "x", x);
  }
  void check_c(const char* name, const Tensor& c) const {
    check.shape(name, c, {{"C", in.sizes().carried}, state_rows(), {"H", in.heads}, {"P", in.units}});
    check.device(name, c, "x", x);
  }

  Tensor empty_state_h() const { return empty(x, {in.sequences.count, in.heads, in.outputs}, state_type()); }
  Tensor empty_state_c() const {
    return empty(x, {in.sizes().carried, in.sequences.count, in.heads, in.units}, state_type());
  }
  ScalarType state_type() const { return scalar_type(in.accumulator); }

  // The tensors of tokens that are made for x, as kernels see them.
  Tensor empty_gates() const { return empty_tokens(x, {in.heads, in.sizes().gates, in.units}, x.scalar_type()); }
  Tensor empty_outputs() const { return empty_tokens(x, {in.heads, in.outputs}, x.scalar_type()); }
  Tensor empty_units() const { return empty_tokens(x, {in.heads, in.units}, x.scalar_type()); }
  GateData gates(const Tensor& t) const {
    return {t.data_ptr(), in.x.dtype, t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  }
  TokenData rows(const Tensor& t) const { return {t.data_ptr(), in.x.dtype, t.stride(0), t.stride(1), t.stride(2)}; }
  // (C, B, L, H, P)
  Tensor empty_carried() const {
    const bool swapped = time_major(x);
    const int64_t B = in.sequences.batch, L = in.sequences.length;
    const Tensor c = empty(x, {in.sizes().carried, swapped ? L : B, swapped ? B : L, in.heads, in.units}, state_type());
    return swapped ? torch::stable::transpose(c, 1, 2) : c;
  }
  CarriedData carried(const Tensor& t) const {
    return {t.data_ptr(), in.accumulator, t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  }

 private:
  Dim state_rows() const { return {packing.cu_seqlens ? "num_sequences" : "B", in.sequences.count}; }

  // Before anything is read from x.
  const Checker& checked(const Tensor& x_in, const Options& options) const {
    const CellSizes sizes = sizes_of(cell_given(options));
    check.shape("x", x_in, {{"B"}, {"L"}, {"H"}, {"G", sizes.gates}, {"P"}});
    check.floating("x", x_in);
    return check;
  }
  Cell cell_given(const Options& options) const { return cell_of(check, options.cell); }

  void set_random(const Options& options, const MaybeTensor& seed_in) {
    const auto probability = [&](const char* name, double value) {
      if (!(value >= 0 && value < 1)) check.fail(name, " must be at least 0 and below 1, got ", value);
      return value;
    };
    in.training = options.training;
    in.zoneout = probability("zoneout", options.zoneout);
    in.recurrent_dropout = probability("recurrent_dropout", options.recurrent_dropout);
    if (!in.training || !(in.zones() || in.drops())) return;
    if (!seed_in) check.fail("seed must be given where zoneout or recurrent_dropout draw random numbers");
    check.shape("seed", *seed_in, Dims{});
    if (seed_in->scalar_type() != ScalarType::Long)
      check.fail("seed must be int64, got ", dtype_name(seed_in->scalar_type()), "; convert it with .long()");
    check.device("seed", *seed_in, "x", x);
    seed = *seed_in;
    in.seed = static_cast<const int64_t*>(seed->data_ptr());
  }
};

}  // namespace seqkern::rnn

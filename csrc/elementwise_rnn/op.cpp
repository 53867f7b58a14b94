// elementwise_rnn for torch: schemas, checks, allocation, registration. Its step: op_step.cpp.
#include "common/isa.h"
#include "common/library.h"
#include "common/tensor.h"
#include "elementwise_rnn/call.h"
#include "elementwise_rnn/cpu_plan.h"
#include "elementwise_rnn/tile.h"
#include "elementwise_rnn/tile_bwd.h"

namespace seqkern::elementwise_rnn {
namespace {

const CpuKernels& cpu_kernels() {
  return select(generic::kernels, avx2::kernels, avx512::kernels);
}

// What forward and backward are both given, checked, and kept alive while kernels read it.
struct Call {
  Checker check{"elementwise_rnn"};
  Inputs in{};
  Tensor x, weights;
  MaybeTensor initial_state, reset;
  Packing packing;
  std::vector<Run> runs;

  Call(const Tensor& x_in, const Tensor& weights_in, const MaybeTensor& initial_state_in, const MaybeTensor& reset_in,
       const MaybeTensor& cu_seqlens, int64_t cell, bool reverse, bool split_time, Target target)
      : x(x_in), weights(weights_in) {
    in.cell = cell_of(check, cell), in.split_time = split_time;
    const CellSizes sizes = in.sizes();
    check.shape("x", x, {{"B"}, {"L"}, {"G", sizes.gates}, {"D"}});
    const int64_t B = x.size(0), L = x.size(1);
    in.channels = x.size(3);
    in.accumulator = accumulator(check.floating("x", x));
    packing = Packing(check, "x", x, B, L, cu_seqlens, std::nullopt);
    in.sequences = packing.sequences(B, L, reverse);
    in.x = gates_of(check, x);
    in.weights = weights_of(check, weights, in.cell, "x", x);

    if (initial_state_in) check_state("initial_state", *initial_state_in);
    initial_state = as_contiguous(initial_state_in);
    in.initial_state = array(check, "initial_state", initial_state);
    if (reset_in) {
      check.shape("reset", *reset_in, {{"B", B}, {"L", L}});
      if (reset_in->scalar_type() != ScalarType::Bool)
        check.fail("reset must be bool, got ", dtype_name(reset_in->scalar_type()), "; convert it with .bool()");
      check.device("reset", *reset_in, "x", x);
      reset = as_contiguous(*reset_in);
      in.reset = static_cast<const bool*>(reset->data_ptr());
    }

    if (target == Target::kCpu) {
      runs = host_runs(check, in.sequences);
      if (reset) runs = cut_at_resets(runs, in.sequences, in.reset);
      in.runs = runs.data(), in.num_runs = static_cast<int64_t>(runs.size());
    } else {
      packing.check_values(check, in.sequences);
    }
  }

  void check_state(const char* name, const Tensor& state) const {
    const char* rows = packing.cu_seqlens ? "num_sequences" : "B";
    check.shape(name, state, {{"S", in.sizes().states}, {rows, in.sequences.count}, {"D", in.channels}});
    check.device(name, state, "x", x);
  }

  // (B, L, D)
  Data tokens(const char* name, const Tensor& t) const {
    return {t.data_ptr(), check.floating(name, t), {.b = t.stride(0), .d = 1, .l = t.stride(1)}};
  }

  // The compiler of graphs specializes on sizes of 1: a dimension of its own would tell it the length.
  int64_t checkpoint_rows() const {
    return in.sizes().states * in.sequences.batch * ceil_div(in.sequences.length, kKept);
  }
};

Tensor workspace(const Tensor& like, int64_t bytes) {
  return empty(like, {(bytes + 7) / 8}, ScalarType::Double);
}

// h; then, each where it is asked for, the final state, checkpoints, and sweeps, estimate, repaired.
template <Target kTarget>
std::vector<Tensor> fwd(const Tensor& x, const Tensor& weights, const MaybeTensor& initial_state,
                        const MaybeTensor& reset, const MaybeTensor& cu_seqlens, int64_t cell, int64_t solver,
                        double atol, int64_t max_sweeps, bool reverse, bool split_time, bool return_final_state,
                        bool keep_states, bool return_stats) {
  const Call call(x, weights, initial_state, reset, cu_seqlens, cell, reverse, split_time, kTarget);
  const Checker& check = call.check;
  FwdParams p{call.in};
  if (solver < 0 || solver >= kSolvers) check.fail("solver must be 0 to ", kSolvers - 1, ", got ", solver);
  p.solver = static_cast<Solver>(solver), p.atol = atol, p.max_sweeps = max_sweeps;
  const int64_t B = p.sequences.batch, L = p.sequences.length, D = p.channels, S = p.sizes().states;
  const ScalarType state_type = scalar_type(p.accumulator);

  std::vector<Tensor> out{empty(x, {B, L, D}, x.scalar_type())};
  p.h = call.tokens("h", out[0]);
  if (return_final_state) {
    out.push_back(empty(x, {S, p.sequences.count, D}, state_type));
    p.final_state = array(check, "final_state", out.back());
  }
  if (keep_states) {
    out.push_back(empty(x, {call.checkpoint_rows(), D}, state_type));
    p.checkpoints = array(check, "checkpoints", out.back());
  }
  if (return_stats) {
    const Tensor sweeps = empty(x, {B, D}, ScalarType::Int), estimate = empty(x, {B, D}, ScalarType::Float),
                 repaired = empty(x, {B, D}, ScalarType::Bool);
    p.stats = {static_cast<int32_t*>(sweeps.data_ptr()), static_cast<float*>(estimate.data_ptr()),
               static_cast<bool*>(repaired.data_ptr())};
    out.insert(out.end(), {sweeps, estimate, repaired});
  }

  constexpr bool kCpu = kTarget == Target::kCpu;
  const Tensor scratch = workspace(x, kCpu ? cpu_fwd_workspace_bytes(p) : cuda::fwd_workspace_bytes(p));
  p.workspace = scratch.data_ptr();
  if constexpr (kCpu)
    cpu_kernels().fwd(p);
  else
    launch_beside(x, cuda::fwd, p);
  return out;
}

// dx; then dweights where it is wanted, and dinitial_state where initial_state is given.
template <Target kTarget>
std::vector<Tensor> bwd(const Tensor& dh_in, const MaybeTensor& dfinal_state, const Tensor& x, const Tensor& weights,
                        const Tensor& checkpoints_in, const MaybeTensor& initial_state, const MaybeTensor& reset,
                        const MaybeTensor& cu_seqlens, int64_t cell, bool reverse, bool split_time,
                        bool want_dweights) {
  const Call call(x, weights, initial_state, reset, cu_seqlens, cell, reverse, split_time, kTarget);
  const Checker& check = call.check;
  BwdParams p{call.in};
  const int64_t B = p.sequences.batch, L = p.sequences.length, D = p.channels;
  const CellSizes sizes = p.sizes();

  check.shape("dh", dh_in, {{"B", B}, {"L", L}, {"D", D}});
  check.same_dtype("dh", dh_in, "x", x);
  check.device("dh", dh_in, "x", x);
  const Tensor dh = D == 1 || dh_in.stride(2) == 1 ? dh_in : as_contiguous(dh_in);
  p.dh = call.tokens("dh", dh);
  check.shape("checkpoints", checkpoints_in, {{"S*B*pieces", call.checkpoint_rows()}, {"D", D}});
  check.device("checkpoints", checkpoints_in, "x", x);
  const Tensor checkpoints = torch::stable::to(as_contiguous(checkpoints_in), scalar_type(p.accumulator));
  p.checkpoints = array(check, "checkpoints", checkpoints);
  MaybeTensor dfinal;
  if (dfinal_state) {
    call.check_state("dfinal_state", *dfinal_state);
    dfinal = torch::stable::to(as_contiguous(*dfinal_state), scalar_type(p.accumulator));
    p.dfinal_state = array(check, "dfinal_state", dfinal);
  }

  std::vector<Tensor> grads{empty(x, {B, L, sizes.gates, D}, x.scalar_type())};
  p.dx = {grads[0].data_ptr(), p.x.dtype, grads[0].stride(0), grads[0].stride(1), grads[0].stride(2)};
  if (want_dweights) {
    grads.push_back(empty(x, {sizes.weights, D}, weights.scalar_type()));
    p.dweights = array(check, "dweights", grads.back());
  }
  if (initial_state) {
    // Zeros: a state that no sequence reads has no gradient.
    grads.push_back(torch::stable::new_zeros(*initial_state, initial_state->sizes(), initial_state->scalar_type()));
    p.dinitial_state = array(check, "dinitial_state", grads.back());
  }

  constexpr bool kCpu = kTarget == Target::kCpu;
  const Tensor scratch = workspace(x, kCpu ? cpu_bwd_workspace_bytes(p) : cuda::bwd_workspace_bytes(p));
  p.workspace = scratch.data_ptr();
  if constexpr (kCpu)
    cpu_kernels().bwd(p);
  else
    launch_beside(x, cuda::bwd, p);
  return grads;
}

}  // namespace
}  // namespace seqkern::elementwise_rnn

STABLE_TORCH_LIBRARY_FRAGMENT(SEQKERN_LIBRARY, m) {
  m.def(
      "elementwise_rnn_fwd(Tensor x, Tensor weights, Tensor? initial_state, Tensor? reset, Tensor? cu_seqlens, "
      "int cell, int solver, float atol, int max_sweeps, bool reverse, bool split_time, bool return_final_state, "
      "bool keep_states, bool return_stats) -> Tensor[]");
  m.def(
      "elementwise_rnn_bwd(Tensor dh, Tensor? dfinal_state, Tensor x, Tensor weights, Tensor checkpoints, "
      "Tensor? initial_state, Tensor? reset, Tensor? cu_seqlens, int cell, bool reverse, bool split_time, "
      "bool want_dweights) -> Tensor[]");
}

SEQKERN_REGISTER_CPU(                                                                                 //
    m.impl("elementwise_rnn_fwd", TORCH_BOX(&seqkern::elementwise_rnn::fwd<seqkern::Target::kCpu>));  //
    m.impl("elementwise_rnn_bwd", TORCH_BOX(&seqkern::elementwise_rnn::bwd<seqkern::Target::kCpu>));)
SEQKERN_REGISTER_CUDA(                                                                                 //
    m.impl("elementwise_rnn_fwd", TORCH_BOX(&seqkern::elementwise_rnn::fwd<seqkern::Target::kCuda>));  //
    m.impl("elementwise_rnn_bwd", TORCH_BOX(&seqkern::elementwise_rnn::bwd<seqkern::Target::kCuda>));)

// causal_conv1d for torch: schemas, checks, allocation, registration.
#include <tuple>

#include "causal_conv1d/params.h"
#include "causal_conv1d/tile.h"
#include "common/isa.h"
#include "common/library.h"
#include "common/tensor.h"

namespace seqkern::causal_conv1d {
namespace {

using MaybeTensor = std::optional<Tensor>;

const CpuKernels& cpu_kernels() {
  return select(generic::kernels, avx2::kernels, avx512::kernels);
}

// What forward and backward are both given, checked, and kept alive while kernels read it.
struct Call {
  Checker check{"causal_conv1d"};
  Inputs in{};
  bool channels_first = false;  // memory order of x: channels contiguous
  Tensor x, weight;
  MaybeTensor bias, initial_state;
  Packing packing;
  std::vector<Run> runs;

  Call(const Tensor& x_in, const Tensor& weight_in, const MaybeTensor& bias_in, const MaybeTensor& initial_state_in,
       const MaybeTensor& cu_seqlens, const MaybeTensor& seq_idx, bool silu, int64_t dilation, bool reverse,
       Target target) {
    check.shape("x", x_in, {{"B"}, {"D"}, {"L"}});
    const int64_t B = x_in.size(0), D = x_in.size(1), L = x_in.size(2);
    in.dtype = check.floating("x", x_in);
    check.shape("weight", weight_in, {{"D", D}, {"W"}});
    check.device("weight", weight_in, "x", x_in);
    in.channels = D, in.width = weight_in.size(1), in.dilation = dilation, in.silu = silu;
    check.range("the width W of weight", in.width, 1, kMaxWidth);
    check.range("dilation", dilation, 1, int64_t{1} << 40);
    if (bias_in) {
      check.shape("bias", *bias_in, {{"D", D}});
      check.device("bias", *bias_in, "x", x_in);
    }
    packing = Packing(check, "x", x_in, B, L, cu_seqlens, seq_idx);
    in.sequences = packing.sequences(B, L, reverse);
    channels_first = prefers_channels(x_in);
    x = in_order(x_in, channels_first);
    if (initial_state_in) check_state("initial_state", *initial_state_in);

    weight = as_contiguous(weight_in);
    bias = as_contiguous(bias_in), initial_state = as_contiguous(initial_state_in);
    in.x = x.data_ptr(), in.x_stride = strides(x, channels_first);
    in.weight = array(check, "weight", weight);
    in.bias = array(check, "bias", bias);
    in.initial_state = array(check, "initial_state", initial_state);

    if (target == Target::kCpu) {
      runs = host_runs(check, in.sequences);
      in.runs = runs.data(), in.num_runs = static_cast<int64_t>(runs.size());
    } else {
      packing.check_values(check, in.sequences);
    }
  }

  void check_state(const char* name, const Tensor& state) const {
    check.shape(name, state, {{"N", in.sequences.count}, {"D", in.channels}, {"(W-1)*dilation", in.state_size()}});
    check.device(name, state, "x", x);
  }

  Tensor empty_like_x() const {
    return empty_in_order(x, in.sequences.batch, in.channels, in.sequences.length, x.scalar_type(), channels_first);
  }

  ScalarType accumulator_type() const { return scalar_type(accumulator(in.dtype)); }
};

template <Target kTarget>
std::vector<Tensor> fwd(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                        const MaybeTensor& initial_state, const MaybeTensor& cu_seqlens, const MaybeTensor& seq_idx,
                        bool silu, int64_t dilation, bool reverse, bool return_final_state) {
  const Call call(x, weight, bias, initial_state, cu_seqlens, seq_idx, silu, dilation, reverse, kTarget);
  FwdParams p{call.in};

  std::vector<Tensor> out{call.empty_like_x()};
  p.y = out[0].data_ptr(), p.y_stride = strides(out[0], call.channels_first);
  if (return_final_state) {
    out.push_back(empty(x, {p.sequences.count, p.channels, p.state_size()}, call.accumulator_type()));
    p.final_state = array(call.check, "final_state", out[1]);
  }

  if constexpr (kTarget == Target::kCpu)
    cpu_kernels().fwd(p);
  else
    launch_beside(x, cuda::fwd, p);
  return out;
}

// Gradients of x and weight, then of bias and of initial_state where these are given.
template <Target kTarget>
std::vector<Tensor> bwd(const Tensor& dy, const MaybeTensor& dfinal_state, const Tensor& x, const Tensor& weight,
                        const MaybeTensor& bias, const MaybeTensor& initial_state, const MaybeTensor& cu_seqlens,
                        const MaybeTensor& seq_idx, bool silu, int64_t dilation, bool reverse) {
  const Call call(x, weight, bias, initial_state, cu_seqlens, seq_idx, silu, dilation, reverse, kTarget);
  BwdParams p{call.in};
  const int64_t B = p.sequences.batch, D = p.channels, L = p.sequences.length;

  call.check.shape("dy", dy, {{"B", B}, {"D", D}, {"L", L}});
  call.check.same_dtype("dy", dy, "x", x);
  call.check.device("dy", dy, "x", x);
  const Tensor dy_in_order = in_order(dy, call.channels_first);
  p.dy = dy_in_order.data_ptr(), p.dy_stride = strides(dy_in_order, call.channels_first);
  MaybeTensor dfinal;
  if (dfinal_state) {
    call.check_state("dfinal_state", *dfinal_state);
    dfinal = torch::stable::to(as_contiguous(*dfinal_state), call.accumulator_type());
    p.dfinal_state = array(call.check, "dfinal_state", dfinal);
  }

  std::vector<Tensor> grads{call.empty_like_x(), empty(weight, {D, p.width}, weight.scalar_type())};
  p.dx = grads[0].data_ptr(), p.dx_stride = strides(grads[0], call.channels_first);
  p.dweight = array(call.check, "dweight", grads[1]);
  if (bias) {
    grads.push_back(empty(*bias, {D}, bias->scalar_type()));
    p.dbias = array(call.check, "dbias", grads.back());
  }
  if (initial_state) {
    // Zeros: a state that no sequence reads has no gradient.
    grads.push_back(zeros(*initial_state, {p.sequences.count, D, p.state_size()}, initial_state->scalar_type()));
    p.dinitial_state = array(call.check, "dinitial_state", grads.back());
  }

  constexpr bool kCpu = kTarget == Target::kCpu;
  const int64_t workspace_bytes = kCpu ? partials_bytes(p) : cuda::workspace_bytes(p);
  const Tensor workspace = empty(x, {workspace_bytes / 8 + 1}, ScalarType::Double);
  p.workspace = workspace.data_ptr();

  if constexpr (kCpu)
    cpu_kernels().bwd(p);
  else
    launch_beside(x, cuda::bwd, p);
  return grads;
}

// Of x: (B, D) or (B, D, T). Tokens enter conv_state in place, rows as state_indices says, else row b for batch row b.
template <Target kTarget>
Tensor step(const Tensor& x, Tensor conv_state, const Tensor& weight_in, const MaybeTensor& bias_in,
            const MaybeTensor& state_indices_in, bool silu, int64_t dilation) {
  const Checker check("causal_conv1d_step");
  const bool one_token = x.dim() == 2;
  if (one_token)
    check.shape("x", x, {{"B"}, {"D"}});
  else
    check.shape("x", x, {{"B"}, {"D"}, {"T"}});
  StepParams p{};
  p.batch = x.size(0), p.channels = x.size(1), p.tokens = one_token ? 1 : x.size(2);
  p.dtype = check.floating("x", x), p.silu = silu, p.dilation = dilation;
  check.shape("weight", weight_in, {{"D", p.channels}, {"W"}});
  check.device("weight", weight_in, "x", x);
  p.width = weight_in.size(1);
  check.range("the width W of weight", p.width, 1, kMaxWidth);
  check.range("dilation", dilation, 1, int64_t{1} << 40);
  if (bias_in) {
    check.shape("bias", *bias_in, {{"D", p.channels}});
    check.device("bias", *bias_in, "x", x);
  }
  check.shape("conv_state", conv_state, {{"R"}, {"D", p.channels}, {"S"}});
  check.device("conv_state", conv_state, "x", x);
  p.rows = conv_state.size(0), p.state_size = conv_state.size(2);
  const int64_t needed = (p.width - 1) * dilation;
  if (p.state_size < needed)
    check.fail("conv_state must have at least (W-1)*dilation=", needed, " columns, got ", p.state_size);
  if (!state_indices_in && p.rows != p.batch)
    check.fail("conv_state must have R=B=", p.batch, " rows, got ", p.rows, "; pass state_indices to pick rows");

  const Tensor weight = as_contiguous(weight_in);
  const MaybeTensor bias = as_contiguous(bias_in);
  const StateIndices state_indices(check, state_indices_in, "x", x, p.batch, p.rows);
  p.state_indices = state_indices.data(), p.state_indices_is_int64 = state_indices.is_int64;
  p.x = x.data_ptr(), p.x_stride = {x.stride(0), x.stride(1), one_token ? 0 : x.stride(2)};
  p.weight = array(check, "weight", weight);
  p.bias = array(check, "bias", bias);
  p.conv_state = array(check, "conv_state", conv_state);
  p.conv_state_stride = {conv_state.stride(0), conv_state.stride(1), conv_state.stride(2)};
  Tensor y = one_token ? empty(x, {p.batch, p.channels}, x.scalar_type())
                       : empty(x, {p.batch, p.channels, p.tokens}, x.scalar_type());
  p.y = y.data_ptr(), p.y_stride = {y.stride(0), y.stride(1), one_token ? 0 : y.stride(2)};

  if constexpr (kTarget == Target::kCpu)
    cpu_kernels().step(p);
  else
    launch_beside(x, cuda::step, p);
  return y;
}

}  // namespace
}  // namespace seqkern::causal_conv1d

STABLE_TORCH_LIBRARY_FRAGMENT(SEQKERN_LIBRARY, m) {
  m.def(
      "causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, "
      "Tensor? seq_idx, bool silu, int dilation, bool reverse, bool return_final_state) -> Tensor[]");
  m.def(
      "causal_conv1d_bwd(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, Tensor? seq_idx, bool silu, int dilation, bool reverse) -> Tensor[]");
  m.def(
      "causal_conv1d_step(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor? state_indices, "
      "bool silu, int dilation) -> Tensor");
}

SEQKERN_REGISTER_CPU(                                                                             //
    m.impl("causal_conv1d_fwd", TORCH_BOX(&seqkern::causal_conv1d::fwd<seqkern::Target::kCpu>));  //
    m.impl("causal_conv1d_bwd", TORCH_BOX(&seqkern::causal_conv1d::bwd<seqkern::Target::kCpu>));  //
    m.impl("causal_conv1d_step", TORCH_BOX(&seqkern::causal_conv1d::step<seqkern::Target::kCpu>));)
SEQKERN_REGISTER_CUDA(                                                                             //
    m.impl("causal_conv1d_fwd", TORCH_BOX(&seqkern::causal_conv1d::fwd<seqkern::Target::kCuda>));  //
    m.impl("causal_conv1d_bwd", TORCH_BOX(&seqkern::causal_conv1d::bwd<seqkern::Target::kCuda>));  //
    m.impl("causal_conv1d_step", TORCH_BOX(&seqkern::causal_conv1d::step<seqkern::Target::kCuda>));)

// selective_scan_step for torch: schema, checks, registration.
#include "common/isa.h"
#include "common/library.h"
#include "common/tensor.h"
#include "selective_scan/params.h"

namespace seqkern::selective_scan {
namespace {

using MaybeTensor = std::optional<Tensor>;

// What a step is given, checked. Channels are (H, P): tensors without the dimension P have one channel per head.
struct Step {
  Checker check{"selective_scan_step"};
  StepParams p{};
  const Tensor& u;
  bool headed;  // u is (B, H, P), not (B, D)

  explicit Step(const Tensor& u) : u(u), headed(u.dim() == 3) {
    if (headed)
      check.shape("u", u, {{"B"}, {"H"}, {"P"}});
    else
      check.shape("u", u, {{"B"}, {"D"}});
    p.batch = u.size(0), p.heads = u.size(1), p.size = headed ? u.size(2) : 1;
    p.accumulator = accumulator(check.floating("u", u));
  }

  // Checks a tensor of `first` (if it has a name), the channels, and `last` (likewise).
  void shape(const char* name, const Tensor& t, Dim first, Dim last) const {
    Dim dims[5];
    size_t n = 0;
    if (first.name) dims[n++] = first;
    dims[n++] = {headed ? "H" : "D", p.heads};
    if (headed) dims[n++] = {"P", p.size};
    if (last.name) dims[n++] = last;
    if (last.name && p.complex) dims[n++] = {"2", 2};
    check.shape(name, t, Dims(dims, n));
    check.device(name, t, "u", u);
  }

  StepParams::PerChannel per_token(const char* name, const Tensor& t) const {
    shape(name, t, {"B", p.batch}, {nullptr});
    return {t.data_ptr(), check.floating(name, t), t.stride(0), t.stride(1), headed ? t.stride(2) : 0};
  }

  StepParams::PerChannel per_channel(const char* name, const MaybeTensor& t) const {
    if (!t) return {};
    shape(name, *t, {nullptr}, {nullptr});
    return {t->data_ptr(), check.floating(name, *t), 0, t->stride(0), headed ? t->stride(1) : 0};
  }

  // B or C: (B, N) or (B, G, N).
  StepParams::PerState projection(const char* name, const Tensor& t) const {
    const bool grouped = t.dim() - (p.complex ? 1 : 0) == 3;
    Dim dims[4] = {{"B", p.batch}};
    size_t n = 1;
    if (grouped) dims[n++] = {"G"};
    dims[n++] = {"N", p.states};
    if (p.complex) dims[n++] = {"2", 2};
    check.shape(name, t, Dims(dims, n));
    check.device(name, t, "u", u);
    const int64_t groups = grouped ? t.size(1) : 1;
    if (groups == 0 ? p.heads != 0 : p.heads % groups != 0)
      check.fail(name, " must have a number of groups G that divides ", headed ? "H=" : "D=", p.heads,
                 ", got G=", groups);
    return {t.data_ptr(),
            check.floating(name, t),
            t.stride(0),
            grouped ? t.stride(1) : 0,
            0,
            t.stride(grouped ? 2 : 1),
            groups == 0 ? 1 : p.heads / groups};
  }
};

// Of u: (B, D) or (B, H, P). The token enters `state` in place, rows as state_indices says, else row b for batch row b.
template <Target kTarget>
Tensor step(Tensor state, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
            const MaybeTensor& D, const MaybeTensor& z, const MaybeTensor& delta_bias,
            const MaybeTensor& state_indices_in, bool delta_softplus, bool two_exp) {
  Step call(u);
  const Checker& check = call.check;
  StepParams& p = call.p;
  p.complex = A.dim() == (call.headed ? 4 : 3);
  p.softplus = delta_softplus, p.two_exp = two_exp;
  call.shape("A", A, {nullptr}, {"N"});
  const int64_t channel_dims = call.headed ? 2 : 1;
  p.states = A.size(channel_dims);
  p.A = {A.data_ptr(), check.floating("A", A), 0, A.stride(0), call.headed ? A.stride(1) : 0, A.stride(channel_dims)};
  call.shape("state", state, {"R"}, {"N", p.states});
  p.rows = state.size(0);
  if (!state_indices_in && p.rows != p.batch)
    check.fail("state must have R=B=", p.batch, " rows, got ", p.rows, "; pass state_indices to pick rows");
  p.state = {state.data_ptr(), check.floating("state", state),    state.stride(0),
             state.stride(1),  call.headed ? state.stride(2) : 0, state.stride(1 + channel_dims)};

  p.B = call.projection("B", B), p.C = call.projection("C", C);
  p.u = call.per_token("u", u), p.delta = call.per_token("delta", delta);
  if (z) p.z = call.per_token("z", *z);
  p.D = call.per_channel("D", D), p.delta_bias = call.per_channel("delta_bias", delta_bias);
  const StateIndices state_indices(check, state_indices_in, "u", u, p.batch, p.rows);
  p.state_indices = state_indices.data(), p.state_indices_is_int64 = state_indices.is_int64;

  Tensor y = torch::stable::new_empty(u, u.sizes(), u.scalar_type());
  p.y = call.per_token("y", y);
  if constexpr (kTarget == Target::kCpu)
    select(generic::kernels, avx2::kernels, avx512::kernels).step(p);
  else
    launch_beside(u, cuda::step, p);
  return y;
}

}  // namespace
}  // namespace seqkern::selective_scan

STABLE_TORCH_LIBRARY_FRAGMENT(SEQKERN_LIBRARY, m) {
  m.def(
      "selective_scan_step(Tensor(a!) state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? z, Tensor? delta_bias, Tensor? state_indices, bool delta_softplus, bool two_exp) -> Tensor");
}

SEQKERN_REGISTER_CPU(m.impl("selective_scan_step", TORCH_BOX(&seqkern::selective_scan::step<seqkern::Target::kCpu>));)
SEQKERN_REGISTER_CUDA(m.impl("selective_scan_step", TORCH_BOX(&seqkern::selective_scan::step<seqkern::Target::kCuda>));)

// softmax_scan_step for torch: schema, checks, registration.
#include "common/isa.h"
#include "common/library.h"
#include "common/tensor.h"
#include "softmax_scan/params.h"

namespace seqkern::softmax_scan {
namespace {

using MaybeTensor = std::optional<Tensor>;

// The token enters (m, n, w) in place, rows as state_indices says, else row b for batch row b.
template <Target kTarget>
Tensor step(Tensor m, Tensor n, Tensor w, const Tensor& s, const Tensor& v, const MaybeTensor& state_indices_in) {
  const Checker check("softmax_scan_step");
  StepParams p{};
  check.shape("v", v, {{"B"}, {"H"}, {"V"}});
  p.batch = v.size(0), p.heads = v.size(1), p.size = v.size(2);
  p.accumulator = accumulator(check.floating("v", v));
  const auto rows = [&](const char* name, const Tensor& t, std::initializer_list<Dim> dims) {
    check.shape(name, t, dims);
    check.device(name, t, "v", v);
    return StepParams::Rows{t.data_ptr(), check.floating(name, t), t.stride(0), t.stride(1),
                            t.dim() == 3 ? t.stride(2) : 0};
  };
  const Dim B = {"B", p.batch}, H = {"H", p.heads}, V = {"V", p.size};
  p.m = rows("state's m", m, {{"R"}, H});
  const Dim R = {"R", p.rows = m.size(0)};
  if (!state_indices_in && p.rows != p.batch)
    check.fail("state must have R=B=", p.batch, " rows, got ", p.rows, "; pass state_indices to pick rows");
  p.n = rows("state's n", n, {R, H}), p.w = rows("state's w", w, {R, H, V});
  p.s = rows("s", s, {B, H}), p.v = rows("v", v, {B, H, V});
  const StateIndices state_indices(check, state_indices_in, "v", v, p.batch, p.rows);
  p.state_indices = state_indices.data(), p.state_indices_is_int64 = state_indices.is_int64;

  Tensor o = torch::stable::new_empty(v, v.sizes(), v.scalar_type());
  p.o = rows("o", o, {B, H, V});
  if constexpr (kTarget == Target::kCpu)
    select(generic::kernels, avx2::kernels, avx512::kernels).step(p);
  else
    launch_beside(v, cuda::step, p);
  return o;
}

}  // namespace
}  // namespace seqkern::softmax_scan

STABLE_TORCH_LIBRARY_FRAGMENT(SEQKERN_LIBRARY, m) {
  m.def(
      "softmax_scan_step(Tensor(a!) m, Tensor(b!) n, Tensor(c!) w, Tensor s, Tensor v, Tensor? state_indices) "
      "-> Tensor");
}

SEQKERN_REGISTER_CPU(m.impl("softmax_scan_step", TORCH_BOX(&seqkern::softmax_scan::step<seqkern::Target::kCpu>));)
SEQKERN_REGISTER_CUDA(m.impl("softmax_scan_step", TORCH_BOX(&seqkern::softmax_scan::step<seqkern::Target::kCuda>));)

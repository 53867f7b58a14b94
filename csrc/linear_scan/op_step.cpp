// linear_scan_step for torch: schema, checks, registration.
#include "common/isa.h"
#include "common/library.h"
#include "common/tensor.h"
#include "linear_scan/params.h"

namespace seqkern::linear_scan {
namespace {

using MaybeTensor = std::optional<Tensor>;

// The token enters `state` in place, rows as state_indices says, else row b for batch row b.
template <Target kTarget>
Tensor step(Tensor state, const Tensor& a, const Tensor& b, const MaybeTensor& state_indices_in, bool complex,
            bool log_space) {
  const Checker check("linear_scan_step");
  StepParams p{};
  p.complex = complex, p.log_space = log_space;
  const auto shape = [&](const char* name, const Tensor& t, Dim first, Dim second) {
    const Dim dims[] = {first, second, {"2", 2}};
    check.shape(name, t, Dims(dims, complex ? 3 : 2));
    check.device(name, t, "b", b);
  };
  // A complex number is read as a pair: what does not lie so is copied. The state is written, and must lie so.
  const auto has_pairs = [&](const Tensor& t) {
    return !complex || (t.stride(2) == 1 && t.stride(0) % 2 == 0 && t.stride(1) % 2 == 0);
  };
  const int64_t parts = complex ? 2 : 1;
  const auto rows = [&](const char* name, const Tensor& t) {
    const auto stride = [&](int i) { return t.size(i) == 1 ? 0 : t.stride(i) / parts; };
    return StepParams::Rows{t.data_ptr(), check.floating(name, t), stride(0), stride(1)};
  };

  shape("b", b, {"B"}, {"D"});
  p.batch = b.size(0), p.channels = b.size(1);
  p.accumulator = accumulator(check.floating("b", b));
  if (a.dim() != 1 + parts || (a.size(0) != p.batch && a.size(0) != 1) || (a.size(1) != p.channels && a.size(1) != 1))
    check.fail("a must be (B=", p.batch, " or 1, D=", p.channels, " or 1), got ", shape_text(a));
  check.device("a", a, "b", b);
  shape("state", state, {"R"}, {"D", p.channels});
  p.rows = state.size(0);
  if (!state_indices_in && p.rows != p.batch)
    check.fail("state must have R=B=", p.batch, " rows, got ", p.rows, "; pass state_indices to pick rows");
  if (!has_pairs(state)) check.fail("state must hold its real and imaginary parts as pairs; pass a complex tensor");
  const StateIndices state_indices(check, state_indices_in, "b", b, p.batch, p.rows);
  p.state_indices = state_indices.data(), p.state_indices_is_int64 = state_indices.is_int64;

  const Tensor a_pairs = has_pairs(a) ? a : as_contiguous(a), b_pairs = has_pairs(b) ? b : as_contiguous(b);
  p.state = rows("state", state), p.a = rows("a", a_pairs), p.b = rows("b", b_pairs);
  Tensor h = torch::stable::new_empty(b, b.sizes(), b.scalar_type());
  p.h = rows("h", h);
  if constexpr (kTarget == Target::kCpu)
    select(generic::kernels, avx2::kernels, avx512::kernels).step(p);
  else
    launch_beside(b, cuda::step, p);
  return h;
}

}  // namespace
}  // namespace seqkern::linear_scan

STABLE_TORCH_LIBRARY_FRAGMENT(SEQKERN_LIBRARY, m) {
  m.def(
      "linear_scan_step(Tensor(a!) state, Tensor a, Tensor b, Tensor? state_indices, bool complex, bool log_space) "
      "-> Tensor");
}

SEQKERN_REGISTER_CPU(m.impl("linear_scan_step", TORCH_BOX(&seqkern::linear_scan::step<seqkern::Target::kCpu>));)
SEQKERN_REGISTER_CUDA(m.impl("linear_scan_step", TORCH_BOX(&seqkern::linear_scan::step<seqkern::Target::kCuda>));)

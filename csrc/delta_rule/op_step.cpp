// delta_rule_step for torch: schema, checks, registration.
#include "common/isa.h"
#include "common/library.h"
#include "delta_rule/call.h"

namespace seqkern::delta_rule {
namespace {

// The token enters S in place, rows as state_indices says, else row b for batch row b.
template <Target kTarget>
Tensor step(Tensor S, const Tensor& q, const Tensor& k, const MaybeTensor& erase, const Tensor& v, const Tensor& beta,
            const MaybeTensor& decay, const MaybeTensor& state_indices_in, bool normalize, double scale) {
  const Checker check("delta_rule_step");
  StepParams p{};
  check.shape("v", v, {{"B"}, {"HV"}, {"V"}});
  check.shape("q", q, {{"B", v.size(0)}, {"H"}, {"K"}});
  p.batch = v.size(0), p.value_heads = v.size(1), p.size = v.size(2), p.heads = q.size(1), p.keys = q.size(2);
  check_heads(check, p.heads, p.value_heads);
  p.accumulator = accumulator(check.floating("v", v));
  p.normalize = normalize, p.scale = scale;

  const auto rows = [&](const char* name, const Tensor& t, std::initializer_list<Dim> dims) {
    check.shape(name, t, dims);
    check.device(name, t, "v", v);
    return StepParams::Rows{t.data_ptr(), check.floating(name, t), t.stride(0), t.stride(1),
                            t.dim() == 3 ? t.stride(2) : 0};
  };
  const Dim B = {"B", p.batch}, H = {"H", p.heads}, HV = {"HV", p.value_heads}, K = {"K", p.keys}, V = {"V", p.size};
  check.shape("state", S, {{"R"}, HV, K, V});
  check.device("state", S, "v", v);
  p.rows = S.size(0);
  if (!state_indices_in && p.rows != p.batch)
    check.fail("state must have R=B=", p.batch, " rows, got ", p.rows, "; pass state_indices to pick rows");
  p.S = {S.data_ptr(), check.floating("state", S), S.stride(0), S.stride(1), S.stride(2)}, p.S_v = S.stride(3);

  p.v = rows("v", v, {B, HV, V});
  const auto keys = [&](const char* name, const Tensor& t) {
    check.same_dtype(name, t, "v", v);
    return rows(name, t, {B, H, K});
  };
  p.q = keys("q", q), p.k = keys("k", k);
  if (erase) p.erase = keys("erase_key", *erase);
  p.beta = rows("beta", beta, {B, HV});
  p.form = form_of(decay, 2);
  if (p.form == Decay::kToken) p.decay = rows("log_decay", *decay, {B, HV});
  if (p.form == Decay::kKey) p.decay = rows("log_decay", *decay, {B, HV, K});
  const StateIndices state_indices(check, state_indices_in, "v", v, p.batch, p.rows);
  p.state_indices = state_indices.data(), p.state_indices_is_int64 = state_indices.is_int64;

  Tensor o = torch::stable::new_empty(v, v.sizes(), v.scalar_type());
  p.o = rows("o", o, {B, HV, V});
  if constexpr (kTarget == Target::kCpu)
    select(generic::kernels, avx2::kernels, avx512::kernels).step(p);
  else
    launch_beside(v, cuda::step, p);
  return o;
}

}  // namespace
}  // namespace seqkern::delta_rule

STABLE_TORCH_LIBRARY_FRAGMENT(SEQKERN_LIBRARY, m) {
  m.def(
      "delta_rule_step(Tensor(a!) S, Tensor q, Tensor k, Tensor? erase, Tensor v, Tensor beta, Tensor? decay, "
      "Tensor? state_indices, bool normalize, float scale) -> Tensor");
}

SEQKERN_REGISTER_CPU(m.impl("delta_rule_step", TORCH_BOX(&seqkern::delta_rule::step<seqkern::Target::kCpu>));)
SEQKERN_REGISTER_CUDA(m.impl("delta_rule_step", TORCH_BOX(&seqkern::delta_rule::step<seqkern::Target::kCuda>));)

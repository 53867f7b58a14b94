// linear_attention_step for torch: schema, checks, registration.
#include "common/isa.h"
#include "common/library.h"
#include "linear_attention/call.h"

namespace seqkern::linear_attention {
namespace {

// The token enters S, z and m in place, rows as state_indices says, else row b for batch row b.
template <Target kTarget>
Tensor step(Tensor S, const MaybeTensor& z, const MaybeTensor& m, const Tensor& q, const Tensor& k, const Tensor& v,
            const MaybeTensor& decay, const MaybeTensor& input, const MaybeTensor& A, const MaybeTensor& bias,
            const MaybeTensor& bonus, const MaybeTensor& skip, const MaybeTensor& gate,
            const MaybeTensor& state_indices_in, int64_t form, int64_t normalizer, bool softplus, double low,
            double high, bool read_previous, bool value_major, double scale, double eps) {
  const Names& names = names_of(static_cast<Form>(form));
  const Checker check(names.step);
  StepParams p{};
  check.shape(names.v, v, {{"B"}, {names.value_heads}, {names.size}});
  check.shape(names.q, q, {{"B", v.size(0)}, {names.heads}, {names.keys}});
  p.batch = v.size(0), p.value_heads = v.size(1), p.size = v.size(2), p.heads = q.size(1), p.keys = q.size(2);
  check_heads(check, names, p.heads, p.value_heads);
  p.accumulator = accumulator(check.floating(names.v, v));
  p.form = static_cast<Form>(form), p.softplus = softplus, p.low = low, p.high = high, p.value_major = value_major;
  set_options(p, {form, normalizer, softplus, low, high, read_previous, value_major, scale, eps});

  const auto rows = [&](const char* name, const Tensor& t, std::initializer_list<Dim> dims) {
    check.shape(name, t, dims);
    check.device(name, t, names.v, v);
    return StepParams::Rows{t.data_ptr(), check.floating(name, t), t.stride(0), t.stride(1),
                            t.dim() == 3 ? t.stride(2) : 0};
  };
  const Dim B = {"B", p.batch}, H = {names.heads, p.heads}, HV = {names.value_heads, p.value_heads};
  const Dim K = {names.keys, p.keys}, V = {names.size, p.size};
  const bool is_max = p.normalizer == Normalizer::kMax;
  const char* const S_name = p.normalizer == Normalizer::kNone ? "state" : is_max ? "state's C" : "state's S";
  check.shape(S_name, S, {{"R"}, HV, value_major ? V : K, value_major ? K : V});
  check.device(S_name, S, names.v, v);
  const Dim R = {"R", p.rows = S.size(0)};
  if (!state_indices_in && p.rows != p.batch)
    check.fail("state must have R=B=", p.batch, " rows, got ", p.rows, "; pass state_indices to pick rows");
  p.S = {{S.data_ptr(), check.floating(S_name, S), S.stride(0), S.stride(1), S.stride(value_major ? 3 : 2)},
         S.stride(value_major ? 2 : 3)};
  if (p.normalizer != Normalizer::kNone) p.z = rows(is_max ? "state's n" : "state's z", *z, {R, HV, K});
  if (is_max) p.m = rows("state's m", *m, {R, HV});

  p.q = rows(names.q, q, {B, H, K}), p.k = rows(names.k, k, {B, H, K}), p.v = rows(names.v, v, {B, HV, V});
  check.same_dtype(names.q, q, names.v, v), check.same_dtype(names.k, k, names.v, v);
  if (p.form == Form::kKey) {
    p.decay = rows(names.decay, *decay, {B, HV, K});
  } else if (p.form == Form::kToken && decay->dim() == 1) {
    check.shape(names.decay, *decay, {HV});
    check.device(names.decay, *decay, names.v, v);
    p.decay = {decay->data_ptr(), check.floating(names.decay, *decay), 0, decay->stride(0), 0};
  } else if (p.form != Form::kNone) {
    p.decay = rows(names.decay, *decay, {B, HV});
  }
  if (p.form == Form::kExp) p.input = rows("i", *input, {B, HV});
  const Parameters parameters(check, names, {decay, input, A, bias, bonus, skip, gate}, v, p);
  parameters.set(check, p);
  p.A = array(check, "A", parameters.A), p.bias = array(check, "dt_bias", parameters.bias);
  if (gate) p.gate = rows(names.gate, *gate, {B, HV, V});
  const StateIndices state_indices(check, state_indices_in, names.v, v, p.batch, p.rows);
  p.state_indices = state_indices.data(), p.state_indices_is_int64 = state_indices.is_int64;

  Tensor y = torch::stable::new_empty(v, v.sizes(), v.scalar_type());
  p.y = rows("y", y, {B, HV, V});
  if constexpr (kTarget == Target::kCpu)
    select(generic::kernels, avx2::kernels, avx512::kernels).step(p);
  else
    launch_beside(v, cuda::step, p);
  return y;
}

}  // namespace
}  // namespace seqkern::linear_attention

STABLE_TORCH_LIBRARY_FRAGMENT(SEQKERN_LIBRARY, m) {
  m.def(
      "linear_attention_step(Tensor(a!) S, Tensor(b!)? z, Tensor(c!)? m, Tensor q, Tensor k, Tensor v, Tensor? decay, "
      "Tensor? input, Tensor? A, Tensor? bias, Tensor? bonus, Tensor? skip, Tensor? gate, Tensor? state_indices, "
      "int form, int normalizer, bool softplus, float low, float high, bool read_previous, bool value_major, "
      "float scale, float eps) -> Tensor");
}

SEQKERN_REGISTER_CPU(m.impl("linear_attention_step",
                            TORCH_BOX(&seqkern::linear_attention::step<seqkern::Target::kCpu>));)
SEQKERN_REGISTER_CUDA(m.impl("linear_attention_step",
                             TORCH_BOX(&seqkern::linear_attention::step<seqkern::Target::kCuda>));)

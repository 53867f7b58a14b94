// linear_attention for torch: schemas, checks, allocation, registration. Its step: op_step.cpp.
#include "common/isa.h"
#include "common/library.h"
#include "linear_attention/call.h"
#include "linear_attention/cpu_plan.h"
#include "linear_attention/tile_bwd.h"

namespace seqkern::linear_attention {
namespace {

const CpuKernels& cpu_kernels() {
  return select(generic::kernels, avx2::kernels, avx512::kernels);
}

Tensor workspace(const Tensor& like, int64_t bytes) {
  return empty(like, {(bytes + 7) / 8}, ScalarType::Double);
}

// y; the final state, if asked for; with `keep` what the backward needs: o if it is not y and something reads it, the
// denominators and the maxima.
template <Target kTarget>
std::vector<Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& decay,
                        const MaybeTensor& input, const MaybeTensor& A, const MaybeTensor& bias,
                        const MaybeTensor& bonus, const MaybeTensor& skip, const MaybeTensor& gate,
                        const MaybeTensor& S, const MaybeTensor& z, const MaybeTensor& m, const MaybeTensor& cu_seqlens,
                        const MaybeTensor& seq_idx, int64_t form, int64_t normalizer, bool softplus, double low,
                        double high, bool read_previous, bool value_major, double scale, double eps, bool reverse,
                        bool split_time, bool return_final_state, bool keep) {
  const Call call(q, k, v, {decay, input, A, bias, bonus, skip, gate}, {S, z, m}, cu_seqlens, seq_idx,
                  {form, normalizer, softplus, low, high, read_previous, value_major, scale, eps}, reverse, split_time,
                  kTarget);
  FwdParams p{call.in};
  const auto values = [&](const char* name, Data& data) {
    return call.data(name, torch::stable::new_empty(v, v.sizes(), v.scalar_type()), p.value_heads, p.size, data);
  };
  std::vector<Tensor> out{values("y", p.y)};
  if (return_final_state) {
    const States state = call.empty_state();
    p.final_state = state.state(call.check);
    state.append_to(out);
  }
  const bool normalized = p.normalizer != Normalizer::kNone;
  if (keep && (gate || (skip && normalized))) out.push_back(values("o", p.o));
  if (keep && normalized) p.denominators = out.emplace_back(call.numbers()).data_ptr();
  if (keep && p.normalizer == Normalizer::kMax) p.maxima = out.emplace_back(call.numbers()).data_ptr();

  constexpr bool kCpu = kTarget == Target::kCpu;
  const Tensor scratch = workspace(v, kCpu ? cpu_fwd_workspace_bytes(p) : cuda::fwd_workspace_bytes(p));
  p.workspace = scratch.data_ptr();
  if constexpr (kCpu)
    cpu_kernels().fwd(p);
  else
    launch_beside(v, cuda::fwd, p);
  return out;
}

// The gradients of those tensors that are given, in the order q to m.
template <Target kTarget>
std::vector<Tensor> bwd(const Tensor& dy_in, const MaybeTensor& dS, const MaybeTensor& dz, const MaybeTensor& dm,
                        const MaybeTensor& o_in, const MaybeTensor& denominators, const MaybeTensor& maxima,
                        const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& decay,
                        const MaybeTensor& input, const MaybeTensor& A, const MaybeTensor& bias,
                        const MaybeTensor& bonus, const MaybeTensor& skip, const MaybeTensor& gate,
                        const MaybeTensor& S, const MaybeTensor& z, const MaybeTensor& m, const MaybeTensor& cu_seqlens,
                        const MaybeTensor& seq_idx, int64_t form, int64_t normalizer, bool softplus, double low,
                        double high, bool read_previous, bool value_major, double scale, double eps, bool reverse,
                        bool split_time) {
  const Call call(q, k, v, {decay, input, A, bias, bonus, skip, gate}, {S, z, m}, cu_seqlens, seq_idx,
                  {form, normalizer, softplus, low, high, read_previous, value_major, scale, eps}, reverse, split_time,
                  kTarget);
  const Checker& check = call.check;
  BwdParams p{call.in};
  const ScalarType type = scalar_type(p.accumulator);
  const Tensor dy = call.data("dy", dy_in, p.value_heads, p.size, p.dy);
  check.same_dtype("dy", dy, call.names.v, v);
  MaybeTensor o;
  if (o_in) o = call.data("o", *o_in, p.value_heads, p.size, p.o), check.same_dtype("o", *o, call.names.v, v);
  const auto kept = [&](const char* name, const MaybeTensor& t, bool needed) -> const void* {
    if (!needed) return nullptr;
    if (!t || t->scalar_type() != type || !t->is_contiguous() || t->numel() != call.numbers().numel())
      check.fail(name, " must be what the forward returned");
    return t->data_ptr();
  };
  const bool normalized = p.normalizer != Normalizer::kNone;
  p.denominators = kept("denominators", denominators, normalized);
  p.maxima = kept("maxima", maxima, p.normalizer == Normalizer::kMax);
  if ((normalized || gate) && !o) check.fail("o must be what the forward returned");
  const auto as_sums = [&](const MaybeTensor& t) { return t ? MaybeTensor(torch::stable::to(*t, type)) : t; };
  const States dfinal = call.states("dfinal_state", {as_sums(dS), as_sums(dz), as_sums(dm)});
  p.dfinal_state = dfinal.state(check);

  std::vector<Tensor> grads;
  const auto like = [&](const Tensor& t) -> Tensor& {
    return grads.emplace_back(torch::stable::new_empty(t, t.sizes(), t.scalar_type()));
  };
  const auto like_array = [&](const char* name, const MaybeTensor& t) {
    return t ? array(check, name, like(*t)) : Array{};
  };
  call.data("dq", like(q), p.heads, p.keys, p.dq);
  call.data("dk", like(k), p.heads, p.keys, p.dk);
  call.data("dv", like(v), p.value_heads, p.size, p.dv);
  if (decay && p.gates.form == Form::kKey) {
    const Tensor& t = like(*decay);
    p.ddecay = {t.data_ptr(), p.gates.decay.dtype, t.stride(0), t.stride(1), t.stride(2)};
  } else if (decay) {
    p.ddecay = call.numbers("ddecay", like(*decay), p.gates.form == Form::kToken);
  }
  if (input) p.dinput = call.numbers("dinput", like(*input));
  p.dA = like_array("dA", A), p.dbias = like_array("dbias", bias);
  p.dbonus = like_array("dbonus", bonus), p.dskip = like_array("dD", skip);
  if (gate) call.data("dgate", like(*gate), p.value_heads, p.size, p.dgate);
  // Zeros: a state that no sequence reads has no gradient.
  const auto zeros = [](const MaybeTensor& t) {
    return t ? MaybeTensor(torch::stable::new_zeros(*t, t->sizes(), t->scalar_type())) : t;
  };
  const States dinitial{zeros(S), zeros(z), zeros(m)};
  p.dinitial_state = dinitial.state(check);
  dinitial.append_to(grads);

  constexpr bool kCpu = kTarget == Target::kCpu;
  const Tensor scratch = workspace(v, kCpu ? cpu_bwd_workspace_bytes(p) : cuda::bwd_workspace_bytes(p));
  p.workspace = scratch.data_ptr();
  if constexpr (kCpu)
    cpu_kernels().bwd(p);
  else
    launch_beside(v, cuda::bwd, p);
  return grads;
}

}  // namespace
}  // namespace seqkern::linear_attention

STABLE_TORCH_LIBRARY_FRAGMENT(SEQKERN_LIBRARY, m) {
  const std::string inputs =
      "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? input, Tensor? A, Tensor? bias, Tensor? bonus, "
      "Tensor? skip, Tensor? gate, Tensor? S, Tensor? z, Tensor? m, Tensor? cu_seqlens, Tensor? seq_idx, int form, "
      "int normalizer, bool softplus, float low, float high, bool read_previous, bool value_major, float scale, "
      "float eps, bool reverse, bool split_time";
  m.def(("linear_attention_fwd(" + inputs + ", bool return_final_state, bool keep) -> Tensor[]").c_str());
  m.def(("linear_attention_bwd(Tensor dy, Tensor? dS, Tensor? dz, Tensor? dm, Tensor? o, Tensor? denominators, "
         "Tensor? maxima, " +
         inputs + ") -> Tensor[]")
            .c_str());
}

SEQKERN_REGISTER_CPU(                                                                                   //
    m.impl("linear_attention_fwd", TORCH_BOX(&seqkern::linear_attention::fwd<seqkern::Target::kCpu>));  //
    m.impl("linear_attention_bwd", TORCH_BOX(&seqkern::linear_attention::bwd<seqkern::Target::kCpu>));)
SEQKERN_REGISTER_CUDA(                                                                                   //
    m.impl("linear_attention_fwd", TORCH_BOX(&seqkern::linear_attention::fwd<seqkern::Target::kCuda>));  //
    m.impl("linear_attention_bwd", TORCH_BOX(&seqkern::linear_attention::bwd<seqkern::Target::kCuda>));)

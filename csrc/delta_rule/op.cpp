// delta_rule for torch: schemas, checks, allocation, registration. Its step: op_step.cpp.
#include "common/isa.h"
#include "common/library.h"
#include "delta_rule/call.h"
#include "delta_rule/cpu_plan.h"
#include "delta_rule/tile_bwd.h"

namespace seqkern::delta_rule {
namespace {

const CpuKernels& cpu_kernels() {
  return select(generic::kernels, avx2::kernels, avx512::kernels);
}

Tensor workspace(const Tensor& like, int64_t bytes) {
  return empty(like, {(bytes + 7) / 8}, ScalarType::Double);
}

// o; the final state, if asked for; with `keep` u, for the backward.
template <Target kTarget>
std::vector<Tensor> fwd(const Tensor& q, const Tensor& k, const MaybeTensor& erase, const Tensor& v, const Tensor& beta,
                        const MaybeTensor& decay, const MaybeTensor& initial_state, const MaybeTensor& cu_seqlens,
                        bool normalize, double scale, bool reverse, bool split_time, bool return_final_state,
                        bool keep) {
  const Call call(q, k, erase, v, beta, decay, initial_state, cu_seqlens, normalize, scale, reverse, split_time,
                  kTarget);
  FwdParams p{call.in};
  std::vector<Tensor> out;
  const auto values = [&](const char* name, DType dtype) {
    return call.values(name, out.emplace_back(torch::stable::new_empty(v, v.sizes(), scalar_type(dtype))));
  };
  p.o = values("o", p.v.dtype);
  if (return_final_state) {
    const int64_t N = p.sequences.count;
    out.push_back(empty(v, {N, p.value_heads, p.keys, p.size}, scalar_type(p.accumulator)));
    p.final_state = array(call.check, "final_state", out.back());
  }
  if (keep) p.u = values("u", operand_of(p.v.dtype));

  constexpr bool kCpu = kTarget == Target::kCpu;
  const Tensor scratch = workspace(v, kCpu ? cpu_fwd_workspace_bytes(p) : cuda::fwd_workspace_bytes(p));
  p.workspace = scratch.data_ptr();
  if constexpr (kCpu)
    cpu_kernels().fwd(p);
  else
    launch_beside(v, cuda::fwd, p);
  return out;
}

// The gradients of those tensors that are given, in the order q to initial_state.
template <Target kTarget>
std::vector<Tensor> bwd(const Tensor& dO_in, const Tensor& u_in, const MaybeTensor& dfinal_state, const Tensor& q,
                        const Tensor& k, const MaybeTensor& erase, const Tensor& v, const Tensor& beta,
                        const MaybeTensor& decay, const MaybeTensor& initial_state, const MaybeTensor& cu_seqlens,
                        bool normalize, double scale, bool reverse, bool split_time) {
  const Call call(q, k, erase, v, beta, decay, initial_state, cu_seqlens, normalize, scale, reverse, split_time,
                  kTarget);
  const Checker& check = call.check;
  BwdParams p{call.in};
  Tensor dO = dO_in, u = u_in;
  p.dO = call.values("dO", dO), p.u = call.values("u", u);
  check.same_dtype("dO", dO, "v", v);
  if (p.u.dtype != operand_of(p.v.dtype)) check.fail("u must be what the forward returned");
  MaybeTensor dfinal = dfinal_state;
  if (dfinal) dfinal = call.checked_state("dfinal_state", torch::stable::to(*dfinal, scalar_type(p.accumulator)));
  p.dfinal_state = array(check, "dfinal_state", dfinal);

  std::vector<Tensor> grads;
  const auto like = [&](const Tensor& t) -> Tensor& {
    return grads.emplace_back(torch::stable::new_empty(t, t.sizes(), t.scalar_type()));
  };
  p.dq = call.keys("dq", like(q)), p.dk = call.keys("dk", like(k));
  if (erase) p.derase = call.keys("derase", like(*erase));
  p.dv = call.values("dv", like(v));
  p.dbeta = token_numbers(check, "dbeta", like(beta));
  if (p.form == Decay::kToken) p.ddecay = token_numbers(check, "ddecay", like(*decay));
  if (p.form == Decay::kKey) p.ddecay = token_rows(check, "ddecay", like(*decay));
  if (initial_state) {  // a state that no sequence reads has no gradient
    grads.push_back(torch::stable::new_zeros(*initial_state, initial_state->sizes(), initial_state->scalar_type()));
    p.dinitial_state = array(check, "dinitial_state", grads.back());
  }

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
}  // namespace seqkern::delta_rule

STABLE_TORCH_LIBRARY_FRAGMENT(SEQKERN_LIBRARY, m) {
  const std::string inputs =
      "Tensor q, Tensor k, Tensor? erase, Tensor v, Tensor beta, Tensor? decay, Tensor? initial_state, "
      "Tensor? cu_seqlens, bool normalize, float scale, bool reverse, bool split_time";
  m.def(("delta_rule_fwd(" + inputs + ", bool return_final_state, bool keep) -> Tensor[]").c_str());
  m.def(("delta_rule_bwd(Tensor dO, Tensor u, Tensor? dfinal_state, " + inputs + ") -> Tensor[]").c_str());
}

SEQKERN_REGISTER_CPU(                                                                       //
    m.impl("delta_rule_fwd", TORCH_BOX(&seqkern::delta_rule::fwd<seqkern::Target::kCpu>));  //
    m.impl("delta_rule_bwd", TORCH_BOX(&seqkern::delta_rule::bwd<seqkern::Target::kCpu>));)
SEQKERN_REGISTER_CUDA(                                                                       //
    m.impl("delta_rule_fwd", TORCH_BOX(&seqkern::delta_rule::fwd<seqkern::Target::kCuda>));  //
    m.impl("delta_rule_bwd", TORCH_BOX(&seqkern::delta_rule::bwd<seqkern::Target::kCuda>));)

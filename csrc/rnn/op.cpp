// rnn for torch: schemas, allocation, registration. Its step: op_step.cpp.
#include "rnn/op_cuda.h"
#include "rnn/op_weights.h"

namespace seqkern::rnn {
namespace {

// h; then, where they are asked for, the final h and c, and what the backward needs: u and c of all tokens. grad_clip
// is the backward's, which is given the forward's arguments.
template <Target kTarget>
std::vector<Tensor> fwd(const Tensor& x, const Tensor& R, const MaybeTensor& bias, const MaybeTensor& proj,
                        const MaybeTensor& initial_h, const MaybeTensor& initial_c, const MaybeTensor& reset,
                        const MaybeTensor& cu_seqlens, const MaybeTensor& seed, int64_t cell, bool reverse,
                        double zoneout, double recurrent_dropout, bool training, double, bool batch_invariant,
                        bool return_final_state, bool keep) {
  const Call call(x, R, bias, proj, initial_h, initial_c, reset, cu_seqlens, seed,
                  {cell, reverse, zoneout, recurrent_dropout, training, batch_invariant}, kTarget);
  FwdParams p{call.in};
  std::vector<Tensor> out{call.empty_outputs()};
  p.h = call.rows(out[0]);
  if (return_final_state) {
    const Tensor h = call.empty_state_h(), c = call.empty_state_c();
    p.final_h = array(call.check, "final_h", h), p.final_c = array(call.check, "final_c", c);
    out.insert(out.end(), {h, c});
  }
  if (keep) {
    const Tensor u = call.empty_gates(), c = call.empty_carried();
    p.u = call.gates(u), p.c = call.carried(c);
    out.insert(out.end(), {u, c});
  }
  if constexpr (kTarget == Target::kCpu)
    cpu_kernels().fwd(p);
  else
    cuda_fwd(call, p);
  return out;
}

// dx; then, where they are wanted, dR and of those given dbias and dproj; then of those given dinitial_h, dinitial_c.
template <Target kTarget>
std::vector<Tensor> bwd(const Tensor& dh_in, const MaybeTensor& dfinal_h, const MaybeTensor& dfinal_c, const Tensor& x,
                        const Tensor& R, const MaybeTensor& bias, const MaybeTensor& proj, const MaybeTensor& initial_h,
                        const MaybeTensor& initial_c, const MaybeTensor& reset, const MaybeTensor& cu_seqlens,
                        const MaybeTensor& seed, const Tensor& h_in, const Tensor& u_in, const Tensor& c_in,
                        int64_t cell, bool reverse, double zoneout, double recurrent_dropout, bool training,
                        double grad_clip, bool batch_invariant, bool want_weights) {
  const Call call(x, R, bias, proj, initial_h, initial_c, reset, cu_seqlens, seed,
                  {cell, reverse, zoneout, recurrent_dropout, training, batch_invariant}, kTarget);
  const Checker& check = call.check;
  BwdParams p{call.in};
  p.grad_clip = grad_clip;
  const CellSizes sizes = p.sizes();
  const Dim B{"B", p.sequences.batch}, L{"L", p.sequences.length}, H{"H", p.heads}, G{"G", sizes.gates},
      P{"P", p.units}, Q{"Q", p.outputs}, C{"C", sizes.carried};

  Tensor dh = dh_in, h = h_in, u = u_in;
  const auto outputs = [&](const char* name, Tensor& t) {
    check.shape(name, t, {B, L, H, Q});
    check.same_dtype(name, t, "x", x);
    check.device(name, t, "x", x);
    return token_rows(check, name, t);
  };
  p.dh = outputs("dh", dh), p.h = outputs("h", h);
  check.shape("u", u, {B, L, H, G, P});
  check.same_dtype("u", u, "x", x);
  check.device("u", u, "x", x);
  if (P.size != 1 && u.stride(4) != 1) u = as_contiguous(u);
  p.u = call.gates(u);
  check.shape("c", c_in, {C, B, L, H, P});
  check.device("c", c_in, "x", x);
  Tensor c = torch::stable::to(c_in, call.state_type());
  if (P.size != 1 && c.stride(4) != 1) c = as_contiguous(c);
  p.c = call.carried(c);
  MaybeTensor dlast_h, dlast_c;
  if (dfinal_h) {
    call.check_h("dfinal_h", *dfinal_h);
    dlast_h = torch::stable::to(as_contiguous(*dfinal_h), call.state_type());
    p.dfinal_h = array(check, "dfinal_h", dlast_h);
  }
  if (dfinal_c) {
    call.check_c("dfinal_c", *dfinal_c);
    dlast_c = torch::stable::to(as_contiguous(*dfinal_c), call.state_type());
    p.dfinal_c = array(check, "dfinal_c", dlast_c);
  }

  OfTokens of_tokens{.dx = call.empty_gates()};
  p.dx = call.gates(of_tokens.dx);
  const auto rows = [&](MaybeTensor& t, const Tensor& made) { return t = made, call.rows(made); };
  if (sizes.two_sides) p.du_last = rows(of_tokens.du_last, call.empty_units());
  if (want_weights) p.operand = rows(of_tokens.operand, call.empty_outputs());
  if (want_weights && proj) {
    p.dh_total = rows(of_tokens.dh_total, call.empty_outputs());
    p.m = rows(of_tokens.m, call.empty_units());
  }
  std::vector<Tensor> of_states;
  // Zeros: a state that no sequence reads has no gradient.
  const auto zeros_of = [&](const char* name, const Tensor& like) {
    of_states.push_back(torch::stable::new_zeros(like, like.sizes(), call.state_type()));
    return array(check, name, of_states.back());
  };
  if (initial_h) p.dinitial_h = zeros_of("dinitial_h", *initial_h);
  if (initial_c) p.dinitial_c = zeros_of("dinitial_c", *initial_c);

  if constexpr (kTarget == Target::kCpu)
    cpu_kernels().bwd(p);
  else
    cuda_bwd(call, p);

  std::vector<Tensor> grads{of_tokens.dx};
  if (want_weights) {
    FixedOrder fixed_order = nullptr;
    if (batch_invariant) {
      if constexpr (kTarget == Target::kCpu)
        fixed_order = sum_on_cpu;
      else
        fixed_order = sum_on_cuda;
    }
    append_weights(grads, call.weights, of_tokens, call.in, fixed_order);
  }
  size_t i = 0;
  if (initial_h) grads.push_back(torch::stable::to(of_states[i++], initial_h->scalar_type()));
  if (initial_c) grads.push_back(torch::stable::to(of_states[i++], initial_c->scalar_type()));
  return grads;
}

}  // namespace
}  // namespace seqkern::rnn

STABLE_TORCH_LIBRARY_FRAGMENT(SEQKERN_LIBRARY, m) {
  m.def(
      "rnn_fwd(Tensor x, Tensor R, Tensor? bias, Tensor? proj, Tensor? initial_h, Tensor? initial_c, Tensor? reset, "
      "Tensor? cu_seqlens, Tensor? seed, int cell, bool reverse, float zoneout, float recurrent_dropout, "
      "bool training, float grad_clip, bool batch_invariant, bool return_final_state, bool keep) -> Tensor[]");
  m.def(
      "rnn_bwd(Tensor dh, Tensor? dfinal_h, Tensor? dfinal_c, Tensor x, Tensor R, Tensor? bias, Tensor? proj, "
      "Tensor? initial_h, Tensor? initial_c, Tensor? reset, Tensor? cu_seqlens, Tensor? seed, Tensor h, Tensor u, "
      "Tensor c, int cell, bool reverse, float zoneout, float recurrent_dropout, bool training, float grad_clip, "
      "bool batch_invariant, bool want_weights) -> Tensor[]");
}

SEQKERN_REGISTER_CPU(                                                         //
    m.impl("rnn_fwd", TORCH_BOX(&seqkern::rnn::fwd<seqkern::Target::kCpu>));  //
    m.impl("rnn_bwd", TORCH_BOX(&seqkern::rnn::bwd<seqkern::Target::kCpu>));)
SEQKERN_REGISTER_CUDA(                                                         //
    m.impl("rnn_fwd", TORCH_BOX(&seqkern::rnn::fwd<seqkern::Target::kCuda>));  //
    m.impl("rnn_bwd", TORCH_BOX(&seqkern::rnn::bwd<seqkern::Target::kCuda>));)

// selective_scan for torch: schemas, checks, allocation, registration. Its step: op_step.cpp.
#include "common/isa.h"
#include "common/library.h"
#include "common/tensor.h"
#include "selective_scan/cpu_plan.h"
#include "selective_scan/params.h"
#include "selective_scan/tile.h"

namespace seqkern::selective_scan {
namespace {

using MaybeTensor = std::optional<Tensor>;

const CpuKernels& cpu_kernels() {
  return select(generic::kernels, avx2::kernels, avx512::kernels);
}

Data data(const Checker& check, const char* name, const Tensor& t) {
  return {t.data_ptr(), check.floating(name, t), strides(t, prefers_channels(t))};
}

// What forward and backward are both given, checked, and kept alive while kernels read it.
struct Call {
  Checker check{"selective_scan"};
  Inputs in{};
  Tensor u, delta, A, B, C;
  MaybeTensor z, D, delta_bias, initial_state;
  Packing packing;
  std::vector<Run> runs;

  Call(const Tensor& u_in, const Tensor& delta_in, const Tensor& A_in, const Tensor& B_in, const Tensor& C_in,
       const MaybeTensor& D_in, const MaybeTensor& z_in, const MaybeTensor& delta_bias_in,
       const MaybeTensor& initial_state_in, const MaybeTensor& cu_seqlens, const MaybeTensor& seq_idx,
       bool delta_softplus, bool two_exp, bool reverse, bool split_time, Target target) {
    check.shape("u", u_in, {{"B"}, {"D"}, {"L"}});
    const int64_t batch = u_in.size(0), L = u_in.size(2);
    in.channels = u_in.size(1);
    in.accumulator = accumulator(check.floating("u", u_in));
    in.complex = A_in.dim() == 3;
    shape("A", A_in, {{"D", in.channels}, {"N"}});
    in.states = A_in.size(1);
    in.softplus = delta_softplus, in.two_exp = two_exp, in.split_time = split_time;
    packing = Packing(check, "u", u_in, batch, L, cu_seqlens, seq_idx);
    in.sequences = packing.sequences(batch, L, reverse);

    u = tokens("u", u_in), in.u = data(check, "u", u);
    delta = tokens("delta", delta_in), in.delta = data(check, "delta", delta);
    if (z_in) z = tokens("z", *z_in), in.z = data(check, "z", *z);
    A = as_contiguous(A_in), in.A = array(check, "A", A);
    check.device("A", A, "u", u);
    B = projection("B", B_in, in.B), C = projection("C", C_in, in.C);
    D = per_channel("D", D_in), in.D = array(check, "D", D);
    delta_bias = per_channel("delta_bias", delta_bias_in), in.delta_bias = array(check, "delta_bias", delta_bias);
    if (initial_state_in) check_state("initial_state", *initial_state_in);
    initial_state = as_contiguous(initial_state_in);
    in.initial_state = array(check, "initial_state", initial_state);

    if (target == Target::kCpu) {
      runs = host_runs(check, in.sequences);
      in.runs = runs.data(), in.num_runs = static_cast<int64_t>(runs.size());
    } else {
      packing.check_values(check, in.sequences);
    }
  }

  // Of A, constant B and C, and states: complex ones are pairs.
  void shape(const char* name, const Tensor& t, std::initializer_list<Dim> dims) const {
    std::vector<Dim> all(dims);
    if (in.complex) all.push_back({"2", 2});
    check.shape(name, t, all);
  }

  // Of one value per token, as it lies, or copied where neither its time nor its channels are contiguous.
  Tensor tokens(const char* name, const Tensor& t) const {
    check.shape(name, t, {{"B", in.sequences.batch}, {"D", in.channels}, {"L", in.sequences.length}});
    check.device(name, t, "u", u.defined() ? u : t);
    return in_order(t, prefers_channels(t));
  }

  MaybeTensor per_channel(const char* name, const MaybeTensor& t) const {
    if (!t) return t;
    check.shape(name, *t, {{"D", in.channels}});
    check.device(name, *t, "u", u);
    return as_contiguous(t);
  }

  // B or C: constant (D, N), or variable (B, N, L) or (B, G, N, L). Complex: (D, N, 2), or (B, G, N, 2L) with pairs
  // along time.
  Tensor projection(const char* name, const Tensor& t, Projection& p) const {
    const int64_t batch = in.sequences.batch, D = in.channels, N = in.states, L = in.sequences.length * in.parts();
    const bool constant = t.dim() == (in.complex ? 3 : 2);
    if (constant)
      shape(name, t, {{"D", D}, {"N", N}});
    else if (t.dim() == 3)
      check.shape(name, t, {{"B", batch}, {"N", N}, {"L", L}});
    else
      check.shape(name, t, {{"B", batch}, {"G"}, {"N", N}, {in.complex ? "2L" : "L", L}});
    check.device(name, t, "u", u);
    p.dtype = check.floating(name, t);
    if (constant) {
      const Tensor contiguous = as_contiguous(t);
      p.data = contiguous.data_ptr();
      return contiguous;
    }
    const int64_t d = t.dim();
    p.data = t.data_ptr();
    p.groups = d == 4 ? t.size(1) : 1;
    if (p.groups < 1 || D % p.groups != 0)
      check.fail(name, " must have a number of groups G that divides D=", D, ", got G=", p.groups);
    p.b = t.stride(0), p.g = d == 4 ? t.stride(1) : 0, p.n = t.stride(d - 2);
    p.im = t.stride(d - 1), p.l = p.im * in.parts();
    return t;
  }

  Tensor projection_gradient(const char* name, const Tensor& t, Projection& p) const {
    return projection(name, torch::stable::new_empty(t, t.sizes(), t.scalar_type()), p);
  }

  void check_state(const char* name, const Tensor& state) const {
    const char* rows = packing.cu_seqlens ? "num_sequences" : "B";
    shape(name, state, {{rows, in.sequences.count}, {"D", in.channels}, {"N", in.states}});
    check.device(name, state, "u", u);
  }

  Tensor empty_like_tokens(const Tensor& t) const {
    return empty_in_order(t, in.sequences.batch, in.channels, in.sequences.length, t.scalar_type(),
                          prefers_channels(t));
  }

  Tensor empty_states(ScalarType type) const {
    if (in.complex) return empty(u, {in.sequences.count, in.channels, in.states, 2}, type);
    return empty(u, {in.sequences.count, in.channels, in.states}, type);
  }

  ScalarType accumulator_type() const { return scalar_type(in.accumulator); }
};

// One dimension for batch, chunks and states: torch.compile would specialise on a single chunk.
int64_t checkpoint_rows(const Inputs& in) {
  return in.sequences.batch * num_chunks(in.sequences) * in.states * in.parts();
}

Tensor workspace(const Tensor& like, int64_t bytes) {
  return empty(like, {(bytes + 7) / 8}, ScalarType::Double);
}

// y; then the last state and the checkpoints, where they are asked for.
template <Target kTarget>
std::vector<Tensor> fwd(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                        const MaybeTensor& D, const MaybeTensor& z, const MaybeTensor& delta_bias,
                        const MaybeTensor& initial_state, const MaybeTensor& cu_seqlens, const MaybeTensor& seq_idx,
                        bool delta_softplus, bool two_exp, bool reverse, bool split_time, bool return_last_state,
                        bool keep_checkpoints) {
  const Call call(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, seq_idx, delta_softplus, two_exp,
                  reverse, split_time, kTarget);
  FwdParams p{call.in};
  const ScalarType type = call.accumulator_type();

  std::vector<Tensor> out{call.empty_like_tokens(call.u)};
  p.y = data(call.check, "y", out[0]);
  if (return_last_state) {
    out.push_back(call.empty_states(type));
    p.last_state = array(call.check, "last_state", out.back());
  }
  if (keep_checkpoints) {
    out.push_back(empty(u, {checkpoint_rows(p), p.channels}, type));
    p.checkpoints = out.back().data_ptr();
  }

  constexpr bool kCpu = kTarget == Target::kCpu;
  const Tensor scratch = workspace(u, kCpu ? cpu_fwd_workspace_bytes(p) : cuda::fwd_workspace_bytes(p));
  p.workspace = scratch.data_ptr();
  if constexpr (kCpu)
    cpu_kernels().fwd(p);
  else
    launch_beside(u, cuda::fwd, p);
  return out;
}

// Gradients of u, delta, A, B and C, then of D, z, delta_bias and initial_state where these are given.
template <Target kTarget>
std::vector<Tensor> bwd(const Tensor& dy_in, const MaybeTensor& dlast_state, const Tensor& checkpoints, const Tensor& u,
                        const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const MaybeTensor& D,
                        const MaybeTensor& z, const MaybeTensor& delta_bias, const MaybeTensor& initial_state,
                        const MaybeTensor& cu_seqlens, const MaybeTensor& seq_idx, bool delta_softplus, bool two_exp,
                        bool reverse, bool split_time) {
  const Call call(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, seq_idx, delta_softplus, two_exp,
                  reverse, split_time, kTarget);
  const Checker& check = call.check;
  BwdParams p{call.in};
  const ScalarType type = call.accumulator_type();

  const Tensor dy = call.tokens("dy", dy_in);
  check.same_dtype("dy", dy, "u", u);
  p.dy = data(check, "dy", dy);
  MaybeTensor dlast;
  if (dlast_state) {
    call.check_state("dlast_state", *dlast_state);
    dlast = torch::stable::to(as_contiguous(*dlast_state), type);
    p.dlast_state = array(check, "dlast_state", dlast);
  }
  check.shape("checkpoints", checkpoints, {{"B*chunks*N", checkpoint_rows(p)}, {"D", p.channels}});
  check.device("checkpoints", checkpoints, "u", u);
  if (checkpoints.scalar_type() != type || !checkpoints.is_contiguous())
    check.fail("checkpoints must be what the forward returned");
  p.checkpoints = checkpoints.data_ptr();

  std::vector<Tensor> grads{call.empty_like_tokens(call.u), call.empty_like_tokens(call.delta),
                            torch::stable::new_empty(A, A.sizes(), A.scalar_type()),
                            call.projection_gradient("dB", B, p.dB), call.projection_gradient("dC", C, p.dC)};
  p.du = data(check, "du", grads[0]), p.ddelta = data(check, "ddelta", grads[1]);
  p.dA = array(check, "dA", grads[2]);
  const auto per_channel = [&](const char* name, const Tensor& of) {
    grads.push_back(empty(of, {p.channels}, of.scalar_type()));
    return array(check, name, grads.back());
  };
  if (D) p.dD = per_channel("dD", *D);
  if (z) {
    grads.push_back(call.empty_like_tokens(*call.z));
    p.dz = data(check, "dz", grads.back());
  }
  if (delta_bias) p.ddelta_bias = per_channel("ddelta_bias", *delta_bias);
  if (initial_state) {
    // Zeros: a state that no sequence reads has no gradient.
    grads.push_back(torch::stable::new_zeros(*initial_state, initial_state->sizes(), initial_state->scalar_type()));
    p.dinitial_state = array(check, "dinitial_state", grads.back());
  }

  constexpr bool kCpu = kTarget == Target::kCpu;
  const Tensor scratch = workspace(u, kCpu ? cpu_bwd_workspace_bytes(p) : cuda::bwd_workspace_bytes(p));
  p.workspace = scratch.data_ptr();
  if constexpr (kCpu)
    cpu_kernels().bwd(p);
  else
    launch_beside(u, cuda::bwd, p);
  return grads;
}

}  // namespace
}  // namespace seqkern::selective_scan

STABLE_TORCH_LIBRARY_FRAGMENT(SEQKERN_LIBRARY, m) {
  m.def(
      "selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, Tensor? seq_idx, bool delta_softplus, "
      "bool two_exp, bool reverse, bool split_time, bool return_last_state, bool keep_checkpoints) -> Tensor[]");
  m.def(
      "selective_scan_bwd(Tensor dy, Tensor? dlast_state, Tensor checkpoints, Tensor u, Tensor delta, Tensor A, "
      "Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, "
      "Tensor? seq_idx, bool delta_softplus, bool two_exp, bool reverse, bool split_time) -> Tensor[]");
}

SEQKERN_REGISTER_CPU(                                                                               //
    m.impl("selective_scan_fwd", TORCH_BOX(&seqkern::selective_scan::fwd<seqkern::Target::kCpu>));  //
    m.impl("selective_scan_bwd", TORCH_BOX(&seqkern::selective_scan::bwd<seqkern::Target::kCpu>));)
SEQKERN_REGISTER_CUDA(                                                                               //
    m.impl("selective_scan_fwd", TORCH_BOX(&seqkern::selective_scan::fwd<seqkern::Target::kCuda>));  //
    m.impl("selective_scan_bwd", TORCH_BOX(&seqkern::selective_scan::bwd<seqkern::Target::kCuda>));)

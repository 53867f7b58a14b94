// linear_scan for torch: schemas, checks, allocation, registration. Its step: op_step.cpp.
#include "common/isa.h"
#include "common/library.h"
#include "common/tensor.h"
#include "linear_scan/cpu_plan.h"
#include "linear_scan/params.h"
#include "linear_scan/tile.h"

namespace seqkern::linear_scan {
namespace {

using MaybeTensor = std::optional<Tensor>;

const CpuKernels& cpu_kernels() {
  return select(generic::kernels, avx2::kernels, avx512::kernels);
}

// What forward and backward are both given, checked, and kept alive while kernels read it. The tokens are those of b,
// or dh in the backward.
struct Call {
  Checker check{"linear_scan"};
  Inputs in{};
  const char* x_name;
  Tensor x, a;
  MaybeTensor initial_state, reset;
  Packing packing;
  std::vector<Run> runs;

  Call(const Tensor& a_in, const char* x_name, const Tensor& x_in, const MaybeTensor& initial_state_in,
       const MaybeTensor& reset_in, const MaybeTensor& cu_seqlens, const MaybeTensor& seq_idx, bool complex,
       bool log_space, bool reverse, bool split_time, Target target)
      : x_name(x_name) {
    in.complex = complex, in.log_space = log_space, in.split_time = split_time;
    shape(x_name, x_in, {{"B"}, {"L"}, {"D"}});
    const int64_t B = x_in.size(0), L = x_in.size(1);
    in.channels = x_in.size(2);
    in.accumulator = accumulator(check.floating(x_name, x_in));
    packing = Packing(check, x_name, x_in, B, L, cu_seqlens, seq_idx);
    in.sequences = packing.sequences(B, L, reverse);

    x = lies_by_channels(x_in, false) ? x_in : as_contiguous(x_in);
    check_decay(a_in);
    a = lies_by_channels(a_in, true) ? a_in : as_contiguous(a_in);
    in.a = broadcast(a);
    if (initial_state_in) check_state("initial_state", *initial_state_in);
    initial_state = as_contiguous(initial_state_in);
    in.initial_state = array(check, "initial_state", initial_state);
    if (reset_in) {
      check.shape("reset", *reset_in, {{"B", B}, {"L", L}});
      if (reset_in->scalar_type() != ScalarType::Bool)
        check.fail("reset must be bool, got ", dtype_name(reset_in->scalar_type()), "; convert it with .bool()");
      check.device("reset", *reset_in, x_name, x);
      reset = as_contiguous(*reset_in);
      in.reset = static_cast<const bool*>(reset->data_ptr());
    }

    if (target == Target::kCpu) {
      runs = host_runs(check, in.sequences);
      if (reset) runs = cut_at_resets(runs, in.sequences, in.reset);
      in.runs = runs.data(), in.num_runs = static_cast<int64_t>(runs.size());
    } else {
      packing.check_values(check, in.sequences);
    }
  }

  // Complex tensors are pairs.
  void shape(const char* name, const Tensor& t, std::initializer_list<Dim> dims) const {
    std::vector<Dim> all(dims);
    if (in.complex) all.push_back({"2", 2});
    check.shape(name, t, all);
  }

  // In every dimension the size of b, or 1.
  void check_decay(const Tensor& t) const {
    check.floating("a", t);
    check.device("a", t, x_name, x);
    const int64_t sizes[] = {in.sequences.batch, in.sequences.length, in.channels};
    bool ok = t.dim() == 2 + in.parts() && (!in.complex || t.size(3) == 2);
    for (int i = 0; i < 3 && ok; ++i) ok = t.size(i) == sizes[i] || t.size(i) == 1;
    if (!ok)
      check.fail("a must be (B=", sizes[0], " or 1, L=", sizes[1], " or 1, D=", sizes[2], " or 1), got ",
                 shape_text(t));
  }

  // Channels are contiguous, or may be one number repeated; complex numbers are pairs.
  bool lies_by_channels(const Tensor& t, bool may_repeat) const {
    if (in.complex && (t.stride(3) != 1 || t.stride(0) % 2 != 0 || t.stride(1) % 2 != 0)) return false;
    return t.size(2) == 1 || t.stride(2) == in.parts() || (may_repeat && t.stride(2) == 0);
  }

  // Where every token has its number.
  Data tokens(const char* name, const Tensor& t) const {
    return {
        t.data_ptr(), check.floating(name, t), {.b = t.stride(0) / in.parts(), .d = 1, .l = t.stride(1) / in.parts()}};
  }

  // Of a or da: stride 0 along dimensions of size 1.
  Data broadcast(const Tensor& t) const {
    const auto stride = [&](int i) { return t.size(i) == 1 ? 0 : t.stride(i) / in.parts(); };
    return {t.data_ptr(), check.floating("a", t), {.b = stride(0), .d = stride(2), .l = stride(1)}};
  }

  void check_state(const char* name, const Tensor& state) const {
    const char* rows = packing.cu_seqlens ? "num_sequences" : "B";
    shape(name, state, {{rows, in.sequences.count}, {"D", in.channels}});
    check.device(name, state, x_name, x);
  }

  Tensor empty_tokens(ScalarType type) const {
    const Sequences& s = in.sequences;
    if (in.complex) return empty(x, {s.batch, s.length, in.channels, 2}, type);
    return empty(x, {s.batch, s.length, in.channels}, type);
  }

  Tensor empty_states(ScalarType type) const {
    if (in.complex) return empty(x, {in.sequences.count, in.channels, 2}, type);
    return empty(x, {in.sequences.count, in.channels}, type);
  }
};

Tensor workspace(const Tensor& like, int64_t bytes) {
  return empty(like, {(bytes + 7) / 8}, ScalarType::Double);
}

// h; then the final state, where it is asked for.
template <Target kTarget>
std::vector<Tensor> fwd(const Tensor& a, const Tensor& b, const MaybeTensor& initial_state, const MaybeTensor& reset,
                        const MaybeTensor& cu_seqlens, const MaybeTensor& seq_idx, bool complex, bool log_space,
                        bool reverse, bool split_time, bool return_final_state) {
  const Call call(a, "b", b, initial_state, reset, cu_seqlens, seq_idx, complex, log_space, reverse, split_time,
                  kTarget);
  FwdParams p{call.in};
  p.b = call.tokens("b", call.x);
  std::vector<Tensor> out{call.empty_tokens(b.scalar_type())};
  p.h = call.tokens("h", out[0]);
  if (return_final_state) {
    out.push_back(call.empty_states(scalar_type(p.accumulator)));
    p.final_state = array(call.check, "final_state", out.back());
  }

  constexpr bool kCpu = kTarget == Target::kCpu;
  const Tensor scratch = workspace(b, kCpu ? cpu_fwd_workspace_bytes(p) : cuda::fwd_workspace_bytes(p));
  p.workspace = scratch.data_ptr();
  if constexpr (kCpu)
    cpu_kernels().fwd(p);
  else
    launch_beside(b, cuda::fwd, p);
  return out;
}

// db; then da where h is given, and dinitial_state where initial_state is given.
template <Target kTarget>
std::vector<Tensor> bwd(const Tensor& dh, const MaybeTensor& dfinal_state, const Tensor& a, const MaybeTensor& h_in,
                        const MaybeTensor& initial_state, const MaybeTensor& reset, const MaybeTensor& cu_seqlens,
                        const MaybeTensor& seq_idx, bool complex, bool log_space, bool reverse, bool split_time) {
  if (const size_t dims = complex ? 4 : 3; h_in && h_in->dim() == static_cast<int64_t>(dims)) {
    const Dim like_h[] = {{"B", h_in->size(0)}, {"L", h_in->size(1)}, {"D", h_in->size(2)}, {"2", 2}};
    const Checker check("linear_scan");
    check.shape("dh", dh, Dims(like_h, dims));
    check.same_dtype("dh", dh, "h", *h_in);
  }
  const Call call(a, "dh", dh, initial_state, reset, cu_seqlens, seq_idx, complex, log_space, reverse, split_time,
                  kTarget);
  const Checker& check = call.check;
  BwdParams p{call.in};
  p.dh = call.tokens("dh", call.x);
  MaybeTensor dfinal;
  if (dfinal_state) {
    call.check_state("dfinal_state", *dfinal_state);
    dfinal = torch::stable::to(as_contiguous(*dfinal_state), scalar_type(p.accumulator));
    p.dfinal_state = array(check, "dfinal_state", dfinal);
  }

  std::vector<Tensor> grads{call.empty_tokens(dh.scalar_type())};
  p.db = call.tokens("db", grads[0]);
  const MaybeTensor h = as_contiguous(h_in);
  if (h) {
    const Sequences& s = p.sequences;
    call.shape("h", *h, {{"B", s.batch}, {"L", s.length}, {"D", p.channels}});
    check.device("h", *h, "dh", dh);
    p.h = call.tokens("h", *h);
    grads.push_back(torch::stable::new_empty(a, a.sizes(), a.scalar_type()));
    p.da = call.broadcast(grads.back());
  }
  if (initial_state) {
    // Zeros: a state that no sequence reads has no gradient.
    grads.push_back(torch::stable::new_zeros(*initial_state, initial_state->sizes(), initial_state->scalar_type()));
    p.dinitial_state = array(check, "dinitial_state", grads.back());
  }

  constexpr bool kCpu = kTarget == Target::kCpu;
  const Tensor scratch = workspace(dh, kCpu ? cpu_bwd_workspace_bytes(p) : cuda::bwd_workspace_bytes(p));
  p.workspace = scratch.data_ptr();
  if constexpr (kCpu)
    cpu_kernels().bwd(p);
  else
    launch_beside(dh, cuda::bwd, p);
  return grads;
}

}  // namespace
}  // namespace seqkern::linear_scan

STABLE_TORCH_LIBRARY_FRAGMENT(SEQKERN_LIBRARY, m) {
  m.def(
      "linear_scan_fwd(Tensor a, Tensor b, Tensor? initial_state, Tensor? reset, Tensor? cu_seqlens, "
      "Tensor? seq_idx, bool complex, bool log_space, bool reverse, bool split_time, bool return_final_state) "
      "-> Tensor[]");
  m.def(
      "linear_scan_bwd(Tensor dh, Tensor? dfinal_state, Tensor a, Tensor? h, Tensor? initial_state, Tensor? reset, "
      "Tensor? cu_seqlens, Tensor? seq_idx, bool complex, bool log_space, bool reverse, bool split_time) -> Tensor[]");
}

SEQKERN_REGISTER_CPU(                                                                         //
    m.impl("linear_scan_fwd", TORCH_BOX(&seqkern::linear_scan::fwd<seqkern::Target::kCpu>));  //
    m.impl("linear_scan_bwd", TORCH_BOX(&seqkern::linear_scan::bwd<seqkern::Target::kCpu>));)
SEQKERN_REGISTER_CUDA(                                                                         //
    m.impl("linear_scan_fwd", TORCH_BOX(&seqkern::linear_scan::fwd<seqkern::Target::kCuda>));  //
    m.impl("linear_scan_bwd", TORCH_BOX(&seqkern::linear_scan::bwd<seqkern::Target::kCuda>));)

// softmax_scan for torch: schemas, checks, allocation, registration. Its step: op_step.cpp.
#include "common/isa.h"
#include "common/library.h"
#include "common/tensor.h"
#include "softmax_scan/cpu_plan.h"
#include "softmax_scan/params.h"
#include "softmax_scan/tile.h"

namespace seqkern::softmax_scan {
namespace {

using MaybeTensor = std::optional<Tensor>;

const CpuKernels& cpu_kernels() {
  return select(generic::kernels, avx2::kernels, avx512::kernels);
}

// A state that is given to or by a call, contiguous: all three tensors or none.
struct States {
  MaybeTensor m, n, w;

  State state(const Checker& check) const { return {array(check, "m", m), array(check, "n", n), array(check, "w", w)}; }
};

// What forward and backward are both given, checked, and kept alive while kernels read it.
struct Call {
  Checker check{"softmax_scan"};
  Inputs in{};
  Tensor s, v;
  States initial_state;
  Packing packing;
  std::vector<Run> runs;

  Call(const Tensor& s_in, const Tensor& v_in, const MaybeTensor& m, const MaybeTensor& n, const MaybeTensor& w,
       const MaybeTensor& cu_seqlens, const MaybeTensor& seq_idx, bool reverse, bool split_time, Target target) {
    check.shape("v", v_in, {{"B"}, {"L"}, {"H"}, {"V"}});
    const int64_t B = v_in.size(0), L = v_in.size(1);
    in.heads = v_in.size(2), in.size = v_in.size(3), in.split_time = split_time;
    in.accumulator = accumulator(check.floating("v", v_in));
    packing = Packing(check, "v", v_in, B, L, cu_seqlens, seq_idx);
    in.sequences = packing.sequences(B, L, reverse);
    v = v_in;
    check.shape("s", s_in, {{"B", B}, {"L", L}, {"H", in.heads}});
    check.device("s", s_in, "v", v);
    s = s_in;
    in.s = data("s", s);
    v = values("v", v_in);
    in.v = data("v", v);
    initial_state = states("initial_state", m, n, w);
    in.initial_state = initial_state.state(check);
    if (target == Target::kCpu) {
      runs = host_runs(check, in.sequences);
      in.runs = runs.data(), in.num_runs = static_cast<int64_t>(runs.size());
    } else {
      packing.check_values(check, in.sequences);
    }
  }

  Data data(const char* name, const Tensor& t) const {
    return {t.data_ptr(), check.floating(name, t), t.stride(0), t.stride(1), t.stride(2)};
  }

  // (B, L, H, V) with contiguous values, copied where they are not.
  Tensor values(const char* name, const Tensor& t) const {
    const Sequences& sequences = in.sequences;
    check.shape(name, t, {{"B", sequences.batch}, {"L", sequences.length}, {"H", in.heads}, {"V", in.size}});
    check.device(name, t, "v", v);
    return t.size(3) == 1 || t.stride(3) == 1 ? t : as_contiguous(t);
  }

  States states(const char* name, const MaybeTensor& m, const MaybeTensor& n, const MaybeTensor& w) const {
    if (!m && !n && !w) return {};
    if (!m || !n || !w) check.fail(name, " must be the three tensors (m, n, w), or None");
    const Dim rows = {packing.cu_seqlens ? "num_sequences" : "B", in.sequences.count}, heads = {"H", in.heads};
    const auto part = [&](const char* letter, const Tensor& t, std::initializer_list<Dim> dims) {
      const std::string full_name = std::string(name) + "'s " + letter;
      check.shape(full_name.c_str(), t, dims);
      check.floating(full_name.c_str(), t);
      check.device(full_name.c_str(), t, "v", v);
      return as_contiguous(t);
    };
    return {part("m", *m, {rows, heads}), part("n", *n, {rows, heads}), part("w", *w, {rows, heads, {"V", in.size}})};
  }

  // Allocates a state of the same dtypes as `like`, filled with zeros, or of one dtype, uninitialised.
  States zeros_like(const States& like) const {
    const auto zeros = [](const MaybeTensor& t) { return torch::stable::new_zeros(*t, t->sizes(), t->scalar_type()); };
    return {zeros(like.m), zeros(like.n), zeros(like.w)};
  }
  States empty_state() const {
    const ScalarType type = scalar_type(in.accumulator);
    const int64_t rows = in.sequences.count;
    return {empty(v, {rows, in.heads}, type), empty(v, {rows, in.heads}, type),
            empty(v, {rows, in.heads, in.size}, type)};
  }
};

void append(std::vector<Tensor>& out, const States& state) {
  out.insert(out.end(), {*state.m, *state.n, *state.w});
}

Tensor workspace(const Tensor& like, int64_t bytes) {
  return empty(like, {(bytes + 7) / 8}, ScalarType::Double);
}

// o; then m, n and w of the final state, and the normalizers, where they are asked for.
template <Target kTarget>
std::vector<Tensor> fwd(const Tensor& s, const Tensor& v, const MaybeTensor& m, const MaybeTensor& n,
                        const MaybeTensor& w, const MaybeTensor& cu_seqlens, const MaybeTensor& seq_idx, bool reverse,
                        bool split_time, bool return_final_state, bool keep_normalizers) {
  const Call call(s, v, m, n, w, cu_seqlens, seq_idx, reverse, split_time, kTarget);
  FwdParams p{call.in};
  const Sequences& sequences = p.sequences;
  std::vector<Tensor> out{empty(v, {sequences.batch, sequences.length, p.heads, p.size}, v.scalar_type())};
  p.o = call.data("o", out[0]);
  if (return_final_state) {
    const States state = call.empty_state();
    p.final_state = state.state(call.check);
    append(out, state);
  }
  if (keep_normalizers) {
    out.push_back(empty(v, {sequences.batch, sequences.length, p.heads, 2}, scalar_type(p.accumulator)));
    p.normalizers = out.back().data_ptr();
  }

  constexpr bool kCpu = kTarget == Target::kCpu;
  const Tensor scratch = workspace(v, kCpu ? cpu_fwd_workspace_bytes(p) : cuda::fwd_workspace_bytes(p));
  p.workspace = scratch.data_ptr();
  if constexpr (kCpu)
    cpu_kernels().fwd(p);
  else
    launch_beside(v, cuda::fwd, p);
  return out;
}

// ds and dv; then the gradients of m, n and w, where these are given.
template <Target kTarget>
std::vector<Tensor> bwd(const Tensor& do_in, const MaybeTensor& dm, const MaybeTensor& dn, const MaybeTensor& dw,
                        const Tensor& normalizers, const Tensor& o_in, const Tensor& s, const Tensor& v,
                        const MaybeTensor& m, const MaybeTensor& n, const MaybeTensor& w, const MaybeTensor& cu_seqlens,
                        const MaybeTensor& seq_idx, bool reverse, bool split_time) {
  const Call call(s, v, m, n, w, cu_seqlens, seq_idx, reverse, split_time, kTarget);
  const Checker& check = call.check;
  BwdParams p{call.in};
  const Sequences& sequences = p.sequences;
  const ScalarType type = scalar_type(p.accumulator);

  const Tensor do_ = call.values("do", do_in), o = call.values("o", o_in);
  check.same_dtype("do", do_, "v", v);
  check.same_dtype("o", o, "v", v);
  p.do_ = call.data("do", do_), p.o = call.data("o", o);
  check.shape("normalizers", normalizers, {{"B", sequences.batch}, {"L", sequences.length}, {"H", p.heads}, {"2", 2}});
  check.device("normalizers", normalizers, "v", v);
  if (normalizers.scalar_type() != type || !normalizers.is_contiguous())
    check.fail("normalizers must be what the forward returned");
  p.normalizers = normalizers.data_ptr();
  States dfinal = call.states("dfinal_state", dm, dn, dw);
  if (dfinal.m) {
    dfinal = {torch::stable::to(*dfinal.m, type), torch::stable::to(*dfinal.n, type),
              torch::stable::to(*dfinal.w, type)};
    p.dfinal_state = dfinal.state(check);
  }

  std::vector<Tensor> grads{torch::stable::new_empty(s, s.sizes(), s.scalar_type()),
                            torch::stable::new_empty(v, v.sizes(), v.scalar_type())};
  p.ds = call.data("ds", grads[0]), p.dv = call.data("dv", grads[1]);
  if (m) {
    const States dinitial = call.zeros_like({m, n, w});  // zeros: a state that no sequence reads has no gradient
    p.dinitial_state = dinitial.state(check);
    append(grads, dinitial);
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
}  // namespace seqkern::softmax_scan

STABLE_TORCH_LIBRARY_FRAGMENT(SEQKERN_LIBRARY, m) {
  m.def(
      "softmax_scan_fwd(Tensor s, Tensor v, Tensor? m, Tensor? n, Tensor? w, Tensor? cu_seqlens, Tensor? seq_idx, "
      "bool reverse, bool split_time, bool return_final_state, bool keep_normalizers) -> Tensor[]");
  m.def(
      "softmax_scan_bwd(Tensor do_, Tensor? dm, Tensor? dn, Tensor? dw, Tensor normalizers, Tensor o, Tensor s, "
      "Tensor v, Tensor? m, Tensor? n, Tensor? w, Tensor? cu_seqlens, Tensor? seq_idx, bool reverse, "
      "bool split_time) -> Tensor[]");
}

SEQKERN_REGISTER_CPU(                                                                           //
    m.impl("softmax_scan_fwd", TORCH_BOX(&seqkern::softmax_scan::fwd<seqkern::Target::kCpu>));  //
    m.impl("softmax_scan_bwd", TORCH_BOX(&seqkern::softmax_scan::bwd<seqkern::Target::kCpu>));)
SEQKERN_REGISTER_CUDA(                                                                           //
    m.impl("softmax_scan_fwd", TORCH_BOX(&seqkern::softmax_scan::fwd<seqkern::Target::kCuda>));  //
    m.impl("softmax_scan_bwd", TORCH_BOX(&seqkern::softmax_scan::bwd<seqkern::Target::kCuda>));)

// rnn_step for torch: schema, checks, registration.
#include "common/isa.h"
#include "common/library.h"
#include "rnn/call.h"
#include "rnn/stepwise.h"

namespace seqkern::rnn {
namespace {

// The token enters the state in place, rows as state_indices says, else row b for batch row b.
template <Target kTarget>
Tensor step(Tensor state0, MaybeTensor state1, MaybeTensor state2, MaybeTensor state3, const Tensor& x_in,
            const Tensor& R, const MaybeTensor& bias, const MaybeTensor& proj, const MaybeTensor& state_indices_in,
            int64_t cell, double zoneout) {
  const Checker check("rnn_step");
  StepParams p{};
  p.cell = cell_of(check, cell);
  const CellSizes sizes = sizes_of(p.cell);
  check.shape("x", x_in, {{"B"}, {"H"}, {"G", sizes.gates}, {"P"}});
  p.accumulator = accumulator(check.floating("x", x_in));
  const Weights weights(check, p.cell, x_in, R, bias, proj);
  p.batch = x_in.size(0), p.heads = x_in.size(1), p.units = x_in.size(3), p.outputs = weights.outputs;
  p.R = array(check, "R", weights.R), p.bias = array(check, "bias", weights.bias);
  p.proj = array(check, "proj", weights.proj);
  if (!(zoneout >= 0 && zoneout < 1)) check.fail("zoneout must be at least 0 and below 1, got ", zoneout);
  p.zoneout = zoneout;
  Tensor x = x_in;
  p.x = gates_of(check, x);

  const auto rows = [&](const char* name, const Tensor& t) {
    const auto stride = [&](int i) { return t.size(i) == 1 ? 0 : t.stride(i); };
    return StepParams::Rows{t.data_ptr(), check.floating(name, t), stride(0), stride(1), stride(2)};
  };
  constexpr const char* kNames[] = {"state's h", "state's c", "state's n", "state's m"};
  const MaybeTensor states[] = {state0, state1, state2, state3};
  p.rows = state0.dim() == 3 ? state0.size(0) : 0;
  for (int i = 0; i < 4; ++i) {
    if (states[i].has_value() != (i < sizes.published))
      check.fail("state must have ", sizes.published, " parts for cell '", sizes.name, "'");
    if (!states[i]) continue;
    const Dim last = i == 0 ? Dim{"Q", p.outputs} : Dim{"P", p.units};
    check.shape(kNames[i], *states[i], {i == 0 ? Dim{"R"} : Dim{"R", p.rows}, {"H", p.heads}, last});
    check.device(kNames[i], *states[i], "x", x);
    p.state[i] = rows(kNames[i], *states[i]);
  }
  if (!state_indices_in && p.rows != p.batch)
    check.fail("state must have R=B=", p.batch, " rows, got ", p.rows, "; pass state_indices to pick rows");
  const StateIndices state_indices(check, state_indices_in, "x", x, p.batch, p.rows);
  p.state_indices = state_indices.data(), p.state_indices_is_int64 = state_indices.is_int64;

  Tensor h = empty(x, {p.batch, p.heads, p.outputs}, x.scalar_type());
  p.h = rows("h", h);
  if constexpr (kTarget == Target::kCpu) {
    select(generic::kernels, avx2::kernels, avx512::kernels).step(p);
  } else {
    const Tensor scratch = empty(x, {(cuda::step_workspace_bytes(p) + 7) / 8}, ScalarType::Double);
    p.workspace = scratch.data_ptr();
    launch_beside(x, cuda::step, p);
  }
  return h;
}

}  // namespace
}  // namespace seqkern::rnn

STABLE_TORCH_LIBRARY_FRAGMENT(SEQKERN_LIBRARY, m) {
  m.def(
      "rnn_step(Tensor(a!) state0, Tensor(b!)? state1, Tensor(c!)? state2, Tensor(d!)? state3, Tensor x, Tensor R, "
      "Tensor? bias, Tensor? proj, Tensor? state_indices, int cell, float zoneout) -> Tensor");
}

SEQKERN_REGISTER_CPU(m.impl("rnn_step", TORCH_BOX(&seqkern::rnn::step<seqkern::Target::kCpu>));)
SEQKERN_REGISTER_CUDA(m.impl("rnn_step", TORCH_BOX(&seqkern::rnn::step<seqkern::Target::kCuda>));)

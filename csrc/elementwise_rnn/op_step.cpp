// elementwise_rnn_step for torch: schema, checks, registration.
#include "common/isa.h"
#include "common/library.h"
#include "elementwise_rnn/call.h"

namespace seqkern::elementwise_rnn {
namespace {

// The token enters the state in place, rows as state_indices says, else row b for batch row b.
template <Target kTarget>
Tensor step(Tensor state0, MaybeTensor state1, MaybeTensor state2, MaybeTensor state3, const Tensor& x_in,
            const Tensor& weights_in, const MaybeTensor& state_indices_in, int64_t cell) {
  const Checker check("elementwise_rnn_step");
  StepParams p{};
  p.cell = cell_of(check, cell);
  const CellSizes sizes = sizes_of(p.cell);
  check.shape("x", x_in, {{"B"}, {"G", sizes.gates}, {"D"}});
  p.batch = x_in.size(0), p.channels = x_in.size(2);
  p.accumulator = accumulator(check.floating("x", x_in));
  Tensor x = x_in, weights = weights_in;
  p.x = gates_of(check, x);
  p.weights = weights_of(check, weights, p.cell, "x", x);

  const auto rows = [&](const char* name, const Tensor& t) {
    const auto stride = [&](int i) { return t.size(i) == 1 ? 0 : t.stride(i); };
    return StepParams::Rows{t.data_ptr(), check.floating(name, t), stride(0), stride(1)};
  };
  constexpr const char* kNames[] = {"state's h", "state's c", "state's n", "state's m"};
  const MaybeTensor states[] = {state0, state1, state2, state3};
  p.rows = state0.dim() == 2 ? state0.size(0) : 0;
  for (int i = 0; i < 4; ++i) {
    if (states[i].has_value() != (i < sizes.published))
      check.fail("state must have ", sizes.published, " parts for cell '", sizes.name, "'");
    if (!states[i]) continue;
    check.shape(kNames[i], *states[i], {i == 0 ? Dim{"R"} : Dim{"R", p.rows}, {"D", p.channels}});
    check.device(kNames[i], *states[i], "x", x);
    p.state[i] = rows(kNames[i], *states[i]);
  }
  if (!state_indices_in && p.rows != p.batch)
    check.fail("state must have R=B=", p.batch, " rows, got ", p.rows, "; pass state_indices to pick rows");
  const StateIndices state_indices(check, state_indices_in, "x", x, p.batch, p.rows);
  p.state_indices = state_indices.data(), p.state_indices_is_int64 = state_indices.is_int64;

  Tensor h = empty(x, {p.batch, p.channels}, x.scalar_type());
  p.h = rows("h", h);
  if constexpr (kTarget == Target::kCpu)
    select(generic::kernels, avx2::kernels, avx512::kernels).step(p);
  else
    launch_beside(x, cuda::step, p);
  return h;
}

}  // namespace
}  // namespace seqkern::elementwise_rnn

STABLE_TORCH_LIBRARY_FRAGMENT(SEQKERN_LIBRARY, m) {
  m.def(
      "elementwise_rnn_step(Tensor(a!) state0, Tensor(b!)? state1, Tensor(c!)? state2, Tensor(d!)? state3, Tensor x, "
      "Tensor weights, Tensor? state_indices, int cell) -> Tensor");
}

SEQKERN_REGISTER_CPU(m.impl("elementwise_rnn_step", TORCH_BOX(&seqkern::elementwise_rnn::step<seqkern::Target::kCpu>));)
SEQKERN_REGISTER_CUDA(m.impl("elementwise_rnn_step",
                             TORCH_BOX(&seqkern::elementwise_rnn::step<seqkern::Target::kCuda>));)

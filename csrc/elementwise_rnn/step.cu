// One token, for inference. One launch; the state is updated in place.
#include "common/launch.h"
#include "elementwise_rnn/rnn.cuh"
#include "elementwise_rnn/tile_step.h"

namespace seqkern::elementwise_rnn::cuda {
namespace {

using Rows = StepParams::Rows;

template <typename R>
__device__ __forceinline__ R value(const Rows& x, int64_t row, int64_t d) {
  return load<R>(Array{x.data, x.dtype}, row * x.b + d * x.d);
}
template <typename R>
__device__ __forceinline__ void put(const Rows& x, int64_t row, int64_t d, R value) {
  store(Array{x.data, x.dtype}, row * x.b + d * x.d, value);
}

// What a step is given and leaves is what a cell carries, but for sLSTM: (h, c, n, m) there is (h, y, l) here, whatever
// scale m is given in.
template <typename C, typename R>
__device__ __forceinline__ void take_state(const StepParams& p, int64_t row, int64_t d, R (&s)[C::kStates]) {
  if constexpr (C::kPublishesState) {
#pragma unroll
    for (int i = 0; i < C::kStates; ++i) s[i] = value<R>(p.state[i], row, d);
  } else {
    const R c = value<R>(p.state[1], row, d), n = value<R>(p.state[2], row, d), m = value<R>(p.state[3], row, d);
    C::empty(s);
    const R none = s[2], l = n == R(0) ? none : m + log(n);
    s[0] = value<R>(p.state[0], row, d);
    if (l != none) s[1] = c / n, s[2] = l;
  }
}
template <typename C, typename R>
__device__ __forceinline__ void put_state(const StepParams& p, int64_t row, int64_t d, const R (&s)[C::kStates]) {
  if constexpr (C::kPublishesState) {
#pragma unroll
    for (int i = 0; i < C::kStates; ++i) put(p.state[i], row, d, s[i]);
  } else {
    R none[C::kStates];
    C::empty(none);
    put(p.state[0], row, d, s[0]), put(p.state[1], row, d, s[1]);
    put(p.state[2], row, d, s[2] == none[2] ? R(0) : R(1)), put(p.state[3], row, d, s[2]);
  }
}

// s = cell(x, s) [cell]; h is the first number of the new state
// thread   one channel of one batch row
// bytes    state read and written, x, h once; weights
// limits   B D / 128 < 2^31 blocks; batch rows that share a state row are undefined
template <int kCell, typename R>
__global__ void __launch_bounds__(kStepTile.threads, kStepTile.blocks_per_sm)
    step_kernel(const __grid_constant__ StepParams p) {
  using C = CellOf<kCell, R>;
  const auto [b, d] = divide(global_thread(), p.channels);
  if (b >= p.batch) return;
  const int64_t row = state_row(p, b);
  if (row < 0) return put(p.h, b, d, R(0));
  R w[C::kWeights], x[C::kGates], s[C::kStates];
#pragma unroll
  for (int i = 0; i < C::kWeights; ++i) w[i] = load<R>(p.weights, i * p.channels + d);
#pragma unroll
  for (int g = 0; g < C::kGates; ++g) x[g] = load<R>(Array{p.x.data, p.x.dtype}, b * p.x.b + g * p.x.g + d);
  take_state<C>(p, row, d, s);
  C::step(w, x, s);
  put_state<C>(p, row, d, s), put(p.h, b, d, s[0]);
}

struct Instance {
  DType accumulator;
  void (*kernel[kCells])(StepParams);
};

constexpr Instance kInstances[] = {
    {DType::kFloat32,
     {step_kernel<0, float>, step_kernel<1, float>, step_kernel<2, float>, step_kernel<3, float>,
      step_kernel<4, float>}},
    {DType::kFloat64,
     {step_kernel<0, double>, step_kernel<1, double>, step_kernel<2, double>, step_kernel<3, double>,
      step_kernel<4, double>}},
};
static_assert(kCells * std::size(kInstances) == kStepKernels);

}  // namespace

void step(const StepParams& p, Stream stream) {
  const StepPlan plan = plan_step(p);
  const Instance& instance = find_instance(kInstances, "elementwise_rnn_step",
                                           [&](const Instance& i) { return i.accumulator == p.accumulator; });
  launch({.name = "elementwise_rnn_step", .grid = {plan.blocks}, .threads = plan.tile.threads, .stream = stream},
         instance.kernel[static_cast<int>(p.cell)], p);
}

}  // namespace seqkern::elementwise_rnn::cuda

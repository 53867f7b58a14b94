// One or a few tokens at a time, for inference. One launch; the state is updated in place.
#include "causal_conv1d/params.h"
#include "causal_conv1d/tile.h"
#include "common/array.cuh"
#include "common/grid.cuh"
#include "common/launch.h"
#include "common/math.cuh"
#include "common/sequences.cuh"

namespace seqkern::causal_conv1d::cuda {
namespace {

// y_t = silu?(bias + sum_j weight_j x_{t - (W-1-j) dilation}) [conv], x_{-1} the newest column of the state, which
// then shifts by T tokens [state]
// block    `threads` neighbouring channels (b, d)
// thread   one channel of one batch row, and its state
// shared   none
// bytes    per channel: T sizes read and written, state_size columns read and written
// limits   B D / threads < 2^31 blocks; batch rows that share a state row are undefined
template <typename T>
__global__ void __launch_bounds__(kStepTile.threads, kStepTile.blocks_per_sm)
    step_kernel(const __grid_constant__ StepParams p) {
  using A = Accumulator<T>;
  constexpr int kAtOnce = 4;  // columns that move in registers together
  const auto [b, d] = divide(global_thread(), p.channels);
  if (b >= p.batch) return;
  const T* x = static_cast<const T*>(p.x) + b * p.x_stride.b + d * p.x_stride.d;
  T* y = static_cast<T*>(p.y) + b * p.y_stride.b + d * p.y_stride.d;
  const int64_t row = state_row(p, b);
  if (row < 0) {
    for (int64_t t = 0; t < p.tokens; ++t) store(y + t * p.y_stride.l, static_cast<T>(0.0f));
    return;
  }

  const int64_t state = row * p.conv_state_stride.b + d * p.conv_state_stride.d;
  const auto column = [&](int64_t c) { return state + c * p.conv_state_stride.l; };
  const A bias = p.bias ? load<A>(p.bias, d) : A(0);
  for (int64_t t = 0; t < p.tokens; ++t) {
    A sum = bias;
#pragma unroll 4
    for (int64_t j = 0; j < p.width; ++j) {
      const int64_t tap = t - (p.width - 1 - j) * p.dilation;
      const A value =
          tap >= 0 ? to<A>(load(x + tap * p.x_stride.l)) : load<A>(p.conv_state, column(p.state_size + tap));
      sum = fma(load<A>(p.weight, d * p.width + j), value, sum);
    }
    store(y + t * p.y_stride.l, to<T>(p.silu ? silu<T>(sum) : sum));
  }

  // Column c becomes what was at c + T, oldest first, so that nothing is overwritten before it has moved.
  visit(p.conv_state, [&]<typename U>(U* data) {
    for (int64_t c = 0; c < p.state_size; c += kAtOnce) {
      U moved[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t from = c + i + p.tokens - p.state_size;  // token; negative: a column of the old state
        if (c + i >= p.state_size) continue;
        moved[i] = from >= 0 ? to<U>(load(x + from * p.x_stride.l)) : load(data + column(p.state_size + from));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (c + i < p.state_size) store(data + column(c + i), moved[i]);
      }
    }
  });
}

struct Instance {
  DType dtype;
  void (*kernel)(StepParams);
};

constexpr Instance kInstances[] = {
    {DType::kFloat32, step_kernel<float>},
    {DType::kBFloat16, step_kernel<__nv_bfloat16>},
    {DType::kFloat16, step_kernel<__half>},
    {DType::kFloat64, step_kernel<double>},
};
static_assert(std::size(kInstances) == kStepKernels);

}  // namespace

void step(const StepParams& p, Stream stream) {
  const Plan plan = plan_step(p);
  const Instance& instance =
      find_instance(kInstances, plan.kernel, [&](const Instance& i) { return i.dtype == p.dtype; });
  launch({.name = plan.kernel, .grid = {plan.cut.token_blocks}, .threads = plan.tile.threads, .stream = stream},
         instance.kernel, p);
}

}  // namespace seqkern::causal_conv1d::cuda

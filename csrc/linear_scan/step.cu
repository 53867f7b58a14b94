// One token, for inference. One launch; the state is updated in place.
#include "common/launch.h"
#include "linear_scan/scan.cuh"

namespace seqkern::linear_scan::cuda {
namespace {

using Rows = StepParams::Rows;

template <typename S>
__device__ __forceinline__ S value(const Rows& x, int64_t row, int64_t d) {
  return time_scan::load_number<S>({x.data, x.dtype}, row * x.b + d * x.d);
}
template <typename S>
__device__ __forceinline__ void put(const Rows& x, int64_t row, int64_t d, S value) {
  time_scan::store_number({x.data, x.dtype}, row * x.b + d * x.d, value);
}

// h = a state + b [state], a of [decay]; h is the new state
// thread   one channel of one batch row
// bytes    state read and written, a, b, h once
// limits   B D / 128 < 2^31 blocks; batch rows that share a state row are undefined
template <typename R, bool kComplex>
__global__ void __launch_bounds__(kStepTile.threads, kStepTile.blocks_per_sm)
    step_kernel(const __grid_constant__ StepParams p) {
  using S = Scalar<R, kComplex>;
  const auto [b, d] = divide(global_thread(), p.channels);
  if (b >= p.batch) return;
  const int64_t row = state_row(p, b);
  if (row < 0) return put(p.h, b, d, S{});
  const S h = madd(decay(value<S>(p.a, b, d), p.log_space), value<S>(p.state, row, d), value<S>(p.b, b, d));
  put(p.state, row, d, h), put(p.h, b, d, h);
}

struct Instance {
  DType accumulator;
  bool complex;
  void (*kernel)(StepParams);
};

constexpr Instance kInstances[] = {
    {DType::kFloat32, false, step_kernel<float, false>},
    {DType::kFloat32, true, step_kernel<float, true>},
    {DType::kFloat64, false, step_kernel<double, false>},
    {DType::kFloat64, true, step_kernel<double, true>},
};
static_assert(std::size(kInstances) == kStepKernels);

}  // namespace

void step(const StepParams& p, Stream stream) {
  const StepPlan plan = plan_step(p);
  const Instance& instance = find_instance(kInstances, "linear_scan_step", [&](const Instance& i) {
    return i.accumulator == p.accumulator && i.complex == p.complex;
  });
  launch({.name = "linear_scan_step", .grid = {plan.blocks}, .threads = plan.tile.threads, .stream = stream},
         instance.kernel, p);
}

}  // namespace seqkern::linear_scan::cuda

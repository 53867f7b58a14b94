// After the backward, where `a` is constant along a dimension: da as a sum over it, in a fixed order.
#include "common/launch.h"
#include "linear_scan/scan.cuh"

namespace seqkern::linear_scan::cuda {
namespace {

// da [da] from numbers (B, times, columns)
// thread   every lanes-th addend of one number of da; then the lanes add up theirs
// bytes    the numbers read, da written
// limits   8 or 32 threads for a number of da: B L / 8 or B D / 32 < 2^31 blocks
template <typename R, bool kComplex>
__global__ void __launch_bounds__(kSmallThreads, 4)
    sum_kernel(const __grid_constant__ BwdParams p, const __grid_constant__ DecaySums sums,
               const __grid_constant__ Data from) {
  using S = Scalar<R, kComplex>;
  const int64_t B = p.sequences.batch;
  const auto [number, lane] = divide(global_thread(), sums.lanes);
  const auto [bt, d] = divide(number, sums.over_channels ? 1 : sums.columns);
  const auto [b, t] = divide(bt, sums.over_time ? 1 : sums.times);
  const bool exists = b < (sums.over_batch ? 1 : B);

  // Addends, dimension by dimension.
  const int64_t columns = sums.over_channels ? sums.columns : 1, times = sums.over_time ? sums.times : 1;
  const int64_t count = exists ? (sums.over_batch ? B : 1) * times * columns : 0;
  const int64_t first = b * from.stride.b + t * from.stride.l + d;
  const Array array{from.data, kDType<R>};
  S total{};
#pragma unroll 4
  for (int64_t i = lane; i < count; i += sums.lanes) {
    const auto [row, column] = divide(i, columns);
    const auto [batch, time] = divide(row, times);
    total = total + time_scan::load_number<S>(array, first + batch * from.stride.b + time * from.stride.l + column);
  }
  for (int distance = sums.lanes / 2; distance > 0; distance /= 2) {
    if constexpr (kComplex) {
      total.re += __shfl_xor_sync(0xffffffffu, total.re, distance);
      total.im += __shfl_xor_sync(0xffffffffu, total.im, distance);
    } else {
      total += __shfl_xor_sync(0xffffffffu, total, distance);
    }
  }
  if (!exists || lane != 0) return;
  const Strides& stride = p.da.stride;
  time_scan::store_number({p.da.data, p.da.dtype}, b * stride.b + t * stride.l + d * stride.d, total);
}

struct Instance {
  DType accumulator;
  bool complex;
  void (*kernel)(BwdParams, DecaySums, Data);
};

constexpr Instance kInstances[] = {{DType::kFloat32, false, sum_kernel<float, false>},
                                   {DType::kFloat32, true, sum_kernel<float, true>},
                                   {DType::kFloat64, false, sum_kernel<double, false>},
                                   {DType::kFloat64, true, sum_kernel<double, true>}};
static_assert(std::size(kInstances) == kBwdReduceKernels);

}  // namespace

void bwd_reduce(const BwdParams& p, const BwdPlan& plan, Stream stream) {
  const Instance& instance = find_instance(kInstances, "linear_scan_bwd_reduce", [&](const Instance& i) {
    return i.accumulator == p.accumulator && i.complex == p.complex;
  });
  const DecaySums& sums = plan.sums;
  const int64_t numbers = (sums.over_batch ? 1 : p.sequences.batch) * (sums.over_time ? 1 : sums.times) *
                          (sums.over_channels ? 1 : sums.columns);
  launch({.name = "linear_scan_bwd_sum",
          .grid = {ceil_div(numbers * sums.lanes, kSmallThreads)},
          .threads = kSmallThreads,
          .stream = stream},
         instance.kernel, p, sums, partial_sums(p, plan));
}

}  // namespace seqkern::linear_scan::cuda

// After the backward: dweights from what rows or tiles have of them, in a fixed order.
#include "common/launch.h"
#include "elementwise_rnn/rnn.cuh"
#include "elementwise_rnn/tile_bwd.h"

namespace seqkern::elementwise_rnn::cuda {
namespace {

constexpr int kParts = kSmallThreads / kWarpSize;

template <typename R>
struct Parts {
  R sum[kParts][kWarpSize];
};

// dweights [adjoint] from numbers (rows, W, D)
// block    32 of the W D sums
// warp     a part of the rows: every eighth one
// thread   one sum of these; then those of the first warp add up the parts
// shared   the parts
// bytes    the numbers read, dweights written
// limits   W D / 32 < 2^31 blocks
template <typename R>
__global__ void __launch_bounds__(kSmallThreads, 4)
    sum_kernel(const void* from, const __grid_constant__ Array dweights, const int64_t rows, const int64_t columns) {
  auto& parts = shared_memory<Parts<R>>();
  const int part = time_scan::warp_of(), lane = time_scan::lane_of();
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  R total{};
  if (column < columns) {
#pragma unroll 8
    for (int64_t row = part; row < rows; row += kParts)
      total += load(static_cast<const R*>(from) + row * columns + column);
  }
  parts.sum[part][lane] = total;
  __syncthreads();
  if (part > 0 || column >= columns) return;
#pragma unroll
  for (int other = 1; other < kParts; ++other) total += parts.sum[other][lane];
  store(dweights, column, total);
}

struct Instance {
  DType accumulator;
  void (*kernel)(const void*, Array, int64_t, int64_t);
};

constexpr Instance kInstances[] = {{DType::kFloat32, sum_kernel<float>}, {DType::kFloat64, sum_kernel<double>}};
static_assert(std::size(kInstances) == kBwdReduceKernels);

}  // namespace

void bwd_reduce(const BwdParams& p, const BwdPlan& plan, Stream stream) {
  const Instance& instance = find_instance(kInstances, "elementwise_rnn_bwd_sum",
                                           [&](const Instance& i) { return i.accumulator == p.accumulator; });
  const int64_t columns = p.sizes().weights * p.channels;
  launch({.name = "elementwise_rnn_bwd_sum",
          .grid = {ceil_div(columns, kWarpSize)},
          .threads = kSmallThreads,
          .smem_bytes = kSmallThreads * size_of(p.accumulator),
          .stream = stream},
         instance.kernel, partial_sums(p, plan).data, p.dweights, plan.rows, columns);
}

}  // namespace seqkern::elementwise_rnn::cuda

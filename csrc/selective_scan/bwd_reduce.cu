// After the backward: gradients of parameters as sums over batch rows and segments, of B and C over blocks of channels.
// Every sum has a fixed order.
#include "common/launch.h"
#include "selective_scan/bwd.cuh"

namespace seqkern::selective_scan::cuda {
namespace {

constexpr int kWarps = kReduceThreads / kWarpSize;

// Gradients (D, columns) in any dtype, each the sum of `count` rows (columns, D) of accumulators.
struct ParameterSum {
  Array to;
  int64_t from;  // in the workspace
  int64_t columns;
};
struct ParameterSums {
  ParameterSum sum[5];
  int64_t count;
  int64_t channels;
};

template <typename R>
struct Shared {
  R sums[kWarps][kWarpSize];
};

// dA, dD, ddelta_bias and constant dB, dC [dA] [dB] [dC]
// grid     y: which of them
// block    one column of 32 channels
// thread   every kWarps-th row of one channel; then the first warp adds the warps' sums in order
// shared   one sum per thread
// bytes    the sums read, the gradients written
// limits   N D / 32 < 2^31 blocks
template <typename R>
__global__ void __launch_bounds__(kReduceThreads, 4)
    sum_parameters(const __grid_constant__ ParameterSums all, const void* workspace) {
  auto& shared = shared_memory<Shared<R>>();
  const ParameterSum& sum = all.sum[blockIdx.y];
  const auto [channel_block, column] = divide(blockIdx.x, sum.columns);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t d = channel_block * kWarpSize + lane;
  const R* from = static_cast<const R*>(workspace) + sum.from + column * all.channels + d;
  R total = R(0);
  if (d < all.channels) {
#pragma unroll 8
    for (int64_t i = warp; i < all.count; i += kWarps) total += load(from + i * sum.columns * all.channels);
  }
  shared.sums[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || d >= all.channels) return;
  for (int other = 1; other < kWarps; ++other) total += shared.sums[other][lane];
  store(sum.to, d * sum.columns + column, total);
}

// Variable dB or dC (B, G, N, L, parts) in any dtype, each the sum over the blocks of channels of its group.
struct ProjectionSum {
  Projection to;
  int64_t from;    // in the workspace
  int64_t rows;    // B
  int64_t row;     // N L parts
  int64_t blocks;  // of a group
};

// dB, dC [dB] [dC]
// thread   one number
// bytes    the sums read, the gradients written
// limits   B G N L parts / kReduceThreads < 2^31 blocks
template <typename R>
__global__ void __launch_bounds__(kReduceThreads, 4)
    sum_projection(const __grid_constant__ ProjectionSum sum, const void* workspace) {
  const auto [bg, i] = divide(global_thread(), sum.row);
  const auto [b, group] = divide(bg, sum.to.groups);
  if (b >= sum.rows) return;
  const R* from = static_cast<const R*>(workspace) + sum.from + (group * sum.blocks * sum.rows + b) * sum.row + i;
  R total = R(0);
#pragma unroll 8
  for (int64_t block = 0; block < sum.blocks; ++block) total += load(from + block * sum.rows * sum.row);
  store(Array{sum.to.data, sum.to.dtype}, global_thread(), total);
}

struct Instance {
  DType accumulator;
  void (*parameters)(ParameterSums, const void*);
  void (*projection)(ProjectionSum, const void*);
};

constexpr Instance kInstances[] = {{DType::kFloat32, sum_parameters<float>, sum_projection<float>},
                                   {DType::kFloat64, sum_parameters<double>, sum_projection<double>}};
static_assert(2 * std::size(kInstances) == kBwdReduceKernels);

}  // namespace

void bwd_reduce(const BwdParams& p, const BwdPlan& plan, Stream stream) {
  const Instance& instance = find_instance(kInstances, "selective_scan_bwd_reduce",
                                           [&](const Instance& i) { return i.accumulator == p.accumulator; });
  const BwdWorkspace& w = plan.workspace;
  const int64_t N = p.states * p.parts(), B = p.sequences.batch, piece = plan.cut.piece;

  ParameterSums all{{}, B * plan.cut.segments, p.channels};
  int64_t sums = 0;
  const auto add = [&](const Array& to, int64_t from, int64_t columns) {
    if (to) all.sum[sums++] = {to, from, columns};
  };
  add(p.dA, w.dA, N), add(p.dD, w.dD, 1), add(p.ddelta_bias, w.ddelta_bias, 1);
  const auto add_projection = [&](const Projection& to, int64_t from) {
    if (to.constant()) return add({to.data, to.dtype}, from, N);
    const int64_t blocks = piece > 0 ? p.channels / to.groups / piece * plan.cut.blocks : 0;
    const ProjectionSum sum{to, from, B, N * p.sequences.length, blocks};
    launch({.name = "selective_scan_bwd_sum_projection",
            .grid = {ceil_div(B * to.groups * sum.row, kReduceThreads)},
            .threads = kReduceThreads,
            .stream = stream},
           instance.projection, sum, p.workspace);
  };
  add_projection(p.dB, w.dB), add_projection(p.dC, w.dC);
  launch({.name = "selective_scan_bwd_sum_parameters",
          .grid = {ceil_div(p.channels, kWarpSize) * N, sums},
          .threads = kReduceThreads,
          .smem_bytes = kReduceThreads * size_of(p.accumulator),
          .stream = stream},
         instance.parameters, all, p.workspace);
}

}  // namespace seqkern::selective_scan::cuda

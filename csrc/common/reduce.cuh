// Sums over a warp and over a block, in a fixed order: the same bits in every run and in every thread.
#pragma once

#include "common/device.h"

namespace seqkern {

// All lanes take part and all lanes get the sum.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// All threads of the block take part and all threads get the sum; partial is shared memory that is free before and
// after the call.
template <int kThreads, typename T>
__device__ __forceinline__ T block_sum(T value, T (&partial)[kThreads / kWarpSize]) {
  static_assert(kThreads % kWarpSize == 0, "a block of whole warps");
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  T total = partial[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarpSize; ++warp) total += partial[warp];
  __syncthreads();
  return total;
}

}  // namespace seqkern

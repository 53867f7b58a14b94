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

// Sums of kCount values over the lanes that differ in the bits kFar, kFar / 2 ... kNear, all of which take part. While
// several values are left, a lane keeps half of them, the upper half where its bit is set, and gives the others away:
// it ends with v[0] ... , the kCount / lanes sums (at least one) that its bits, the highest first, have chosen.
template <int kFar, int kNear, int kCount, typename T>
__device__ __forceinline__ void halving_sum(T (&v)[kCount]) {
  int count = kCount;
#pragma unroll
  for (int bit = kFar; bit >= kNear; bit /= 2) {
    if (count == 1) {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], bit);
      continue;
    }
    count /= 2;
    const bool upper = (threadIdx.x & bit) != 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      if (i >= count) continue;
      const T given = upper ? v[i] : v[count + i];
      v[i] = (upper ? v[count + i] : v[i]) + __shfl_xor_sync(0xffffffffu, given, bit);
    }
  }
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

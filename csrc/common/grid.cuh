// One-dimensional grids: which thread this is, and what it owns.
#pragma once

#include "common/device.h"

namespace seqkern {

__device__ __forceinline__ int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

struct Quotient {
  int64_t quotient, remainder;
};

// Of non-negative numbers. A 64-bit division takes about a hundred instructions, and sizes rarely need it.
__device__ __forceinline__ Quotient divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) {
    const uint32_t q = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    return {q, static_cast<uint32_t>(a) - q * static_cast<uint32_t>(b)};
  }
  const int64_t q = a / b;
  return {q, a - q * b};
}

}  // namespace seqkern

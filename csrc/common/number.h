// What code needs that serves CUDA kernels, where a number is a scalar, and CPU kernels, where it is a vector of
// channels: the functions of both, under the same names.
#pragma once

#if defined(__CUDACC__) || defined(SEQKERN_EMULATE)
#include "common/complex.cuh"
#include "common/math.cuh"
#define SEQKERN_FUNCTION __device__ __forceinline__
#else
#include "common/simd_complex.h"
#include "common/simd_math.h"
#define SEQKERN_FUNCTION [[gnu::always_inline]] inline
#endif

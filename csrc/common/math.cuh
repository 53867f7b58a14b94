// Activations and their derivatives. T is the type of the data: 16-bit data take the fast intrinsics, whose relative
// error of about 2^-20 is far below the data's rounding; fp32 and fp64 take the accurate functions.
#pragma once

#include "common/device.h"

namespace seqkern {

template <typename T, typename A>
__device__ __forceinline__ A one_plus_exp(A x) {
  if constexpr (sizeof(T) == 2)
    return 1.0f + __expf(x);
  else if constexpr (sizeof(T) == 4)
    return 1.0f + expf(x);
  else
    return 1.0 + exp(x);
}

template <typename T, typename A>
__device__ __forceinline__ A quotient(A x, A y) {
  if constexpr (sizeof(T) == 2)
    return __fdividef(x, y);
  else
    return x / y;
}

// silu(x) = x sigmoid(x)
template <typename T, typename A>
__device__ __forceinline__ A silu(A x) {
  return quotient<T>(x, one_plus_exp<T>(-x));
}

// silu'(x) = sigmoid(x) (1 + x (1 - sigmoid(x)))
template <typename T, typename A>
__device__ __forceinline__ A silu_derivative(A x) {
  const A sigmoid = quotient<T>(A(1), one_plus_exp<T>(-x));
  return sigmoid * fma(x, A(1) - sigmoid, A(1));
}

}  // namespace seqkern

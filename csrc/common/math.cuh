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

// 2^x as the hardware approximates it; emulated, that of the C library. Results below 2^-126 become 0.
__device__ __forceinline__ float exp2_approx(float x) {
#if defined(SEQKERN_EMULATE)
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// To about 1e-6 of its value.
__device__ __forceinline__ float sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + exp2_approx(x * -1.44269504f));
}
__device__ __forceinline__ double sigmoid(double x) {
  return 1.0 / (1.0 + exp(-x));
}

__device__ __forceinline__ float tanh(float x) {
  return tanhf(x);
}
__device__ __forceinline__ double tanh(double x) {
  return ::tanh(x);
}

// What CPU kernels do by lanes.
template <typename S>
__device__ __forceinline__ S select(bool condition, S yes, S no) {
  return condition ? yes : no;
}

// log(1 + exp(x)), and x itself above 20, where fp32 holds no difference. With e = exp(-|x|) <= 1 it is
// max(x, 0) + log1p(e), and log1p(e) = 2 atanh(s) for s = e / (2 + e) <= 1/3: a polynomial in s^2, to 4e-9.
__device__ __forceinline__ float softplus(float x) {
  const float e = exp2_approx(-fabsf(x) * 1.44269504f);
  const float s = __fdividef(e, 2.0f + e), q = s * s;
  float p = fmaf(q, 0.28178334f, 0.27960602f);
  p = fmaf(q, p, 0.4002491f);
  p = fmaf(q, p, 0.66666314f);
  p = fmaf(q, p, 2.0f);
  return fmaf(s, p, fmaxf(x, 0.0f));
}
__device__ __forceinline__ double softplus(double x) {
  return x > 20.0 ? x : log1p(exp(x));
}

}  // namespace seqkern

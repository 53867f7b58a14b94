// Complex numbers for kernels that serve real and complex scalars from one template.
#pragma once

#include <type_traits>

#include "common/device.h"
#include "common/math.cuh"

namespace seqkern {

// (re, im), as memory holds a pair.
template <typename R>
struct alignas(2 * sizeof(R)) Complex {
  R re{}, im{};

  Complex() = default;
  __device__ __forceinline__ constexpr Complex(R re_, R im_ = R(0)) : re(re_), im(im_) {}
};

template <typename S>
inline constexpr bool kIsComplex = false;
template <typename R>
inline constexpr bool kIsComplex<Complex<R>> = true;

// The real type of a real or complex one.
template <typename S>
struct RealOf {
  using Type = S;
};
template <typename R>
struct RealOf<Complex<R>> {
  using Type = R;
};
template <typename S>
using Real = typename RealOf<S>::Type;

template <typename R>
__device__ __forceinline__ Complex<R> operator+(Complex<R> a, Complex<R> b) {
  return {a.re + b.re, a.im + b.im};
}
template <typename R>
__device__ __forceinline__ Complex<R> operator-(Complex<R> a, Complex<R> b) {
  return {a.re - b.re, a.im - b.im};
}
template <typename R>
__device__ __forceinline__ Complex<R> operator*(Complex<R> a, Complex<R> b) {
  return {fma(a.re, b.re, -(a.im * b.im)), fma(a.re, b.im, a.im * b.re)};
}
template <typename R>
__device__ __forceinline__ Complex<R> operator*(std::type_identity_t<R> a, Complex<R> b) {
  return {a * b.re, a * b.im};
}
template <typename S>
__device__ __forceinline__ S& operator+=(S& a, std::enable_if_t<kIsComplex<S>, S> b) {
  return a = a + b;
}

// a b + c, a complex or real
using ::fma;
template <typename R>
__device__ __forceinline__ Complex<R> fma(Complex<R> a, Complex<R> b, Complex<R> c) {
  return {fma(a.re, b.re, fma(-a.im, b.im, c.re)), fma(a.re, b.im, fma(a.im, b.re, c.im))};
}
template <typename R>
__device__ __forceinline__ Complex<R> fma(std::type_identity_t<R> a, Complex<R> b, Complex<R> c) {
  return {fma(a, b.re, c.re), fma(a, b.im, c.im)};
}

// a b + c under the name that CPU kernels have for it: for code that both share.
template <typename S>
__device__ __forceinline__ S madd(S a, S b, S c) {
  return fma(a, b, c);
}

__device__ __forceinline__ float conj(float a) {
  return a;
}
__device__ __forceinline__ double conj(double a) {
  return a;
}
template <typename R>
__device__ __forceinline__ Complex<R> conj(Complex<R> a) {
  return {a.re, -a.im};
}

// Re(a b) + c
template <typename R>
__device__ __forceinline__ R fma_real(R a, R b, R c) {
  return fma(a, b, c);
}
template <typename R>
__device__ __forceinline__ R fma_real(Complex<R> a, Complex<R> b, R c) {
  return fma(a.re, b.re, fma(-a.im, b.im, c));
}

// exp(t rate) of a real t, for many t: the rate is scaled once. A complex rate turns by half turns (sincospi), whose
// reduction is exact for any angle.
__device__ __forceinline__ float exp_rate(float rate) {
  return rate * 1.4426950408889634f;
}
__device__ __forceinline__ double exp_rate(double rate) {
  return rate * 1.4426950408889634;
}
template <typename R>
__device__ __forceinline__ Complex<R> exp_rate(Complex<R> rate) {
  return {exp_rate(rate.re), rate.im * R(0.31830988618379067)};
}
__device__ __forceinline__ float exp_of(float t, float scaled_rate) {
  return exp2_approx(t * scaled_rate);
}
__device__ __forceinline__ double exp_of(double t, double scaled_rate) {
  return exp2(t * scaled_rate);
}
template <typename R>
__device__ __forceinline__ Complex<R> exp_of(R t, Complex<R> scaled_rate) {
  const R size = exp_of(t, scaled_rate.re);
  R sine, cosine;
  if constexpr (sizeof(R) == 4)
    sincospif(t * scaled_rate.im, &sine, &cosine);
  else
    sincospi(t * scaled_rate.im, &sine, &cosine);
  return {size * cosine, size * sine};
}

}  // namespace seqkern

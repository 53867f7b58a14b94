// Vectors of complex numbers, and functions that serve real and complex ones alike, for CPU kernels: see simd.h.
#pragma once
#include "common/simd_math.h"

namespace seqkern {
namespace {

template <class V>
struct Complex {
  V re, im;
};

inline Float conj(Float x) {
  return x;
}
inline Double conj(Double x) {
  return x;
}
template <class V>
inline Complex<V> conj(Complex<V> x) {
  return {x.re, -x.im};
}

// s x for a real s.
inline Float scale(Float s, Float x) {
  return s * x;
}
inline Double scale(Double s, Double x) {
  return s * x;
}
template <class V>
inline Complex<V> scale(V s, Complex<V> x) {
  return {s * x.re, s * x.im};
}

// x y
inline Float product(Float x, Float y) {
  return x * y;
}
inline Double product(Double x, Double y) {
  return x * y;
}
template <class V>
inline Complex<V> product(Complex<V> x, Complex<V> y) {
  return {madd(x.re, y.re, -(x.im * y.im)), madd(x.re, y.im, x.im * y.re)};
}

// s x + y and x y + z
template <class V>
inline Complex<V> madd(V s, Complex<V> x, Complex<V> y) {
  return {madd(s, x.re, y.re), madd(s, x.im, y.im)};
}
template <class V>
inline Complex<V> madd(Complex<V> x, Complex<V> y, Complex<V> z) {
  return {madd(x.re, y.re, madd(-x.im, y.im, z.re)), madd(x.re, y.im, madd(x.im, y.re, z.im))};
}

template <class V>
inline Complex<V> operator+(Complex<V> x, Complex<V> y) {
  return {x.re + y.re, x.im + y.im};
}

// Re(x y) + z
inline Float madd_real(Float x, Float y, Float z) {
  return madd(x, y, z);
}
inline Double madd_real(Double x, Double y, Double z) {
  return madd(x, y, z);
}
template <class V>
inline V madd_real(Complex<V> x, Complex<V> y, V z) {
  return madd(x.re, y.re, madd(-x.im, y.im, z));
}

// exp(s x) for a real s; of a real x, or of the real part of a complex one, kLog2E x is given.
template <class V>
inline V exp_of_scaled(V s, V x) {
  return exp2(s * x);
}
template <class V>
inline Complex<V> exp_of_scaled(V s, Complex<V> x) {
  V sin, cos;
  sincos(s * x.im, sin, cos);
  const V magnitude = exp2(s * x.re);
  return {magnitude * cos, magnitude * sin};
}

// What exp_of_scaled takes.
inline Float scaled(Float x) {
  return x * kLog2E<float>;
}
inline Double scaled(Double x) {
  return x * kLog2E<double>;
}
template <class V>
inline Complex<V> scaled(Complex<V> x) {
  return {scaled(x.re), x.im};
}

}  // namespace
}  // namespace seqkern

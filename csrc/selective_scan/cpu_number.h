// Numbers of kLanes<A> channels: a vector, or a pair of them where A is complex. Internal to cpu.cpp.
#pragma once
#include "common/simd_math.h"

namespace seqkern::selective_scan {
namespace {

using seqkern::madd;

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

template <class V>
inline V two_exp_minus_one(V x) {
  return x + x - 1;
}
template <class V>
inline Complex<V> two_exp_minus_one(Complex<V> x) {
  return {x.re + x.re - 1, x.im + x.im};
}

// What a call computes with: accumulators A, and whether its states are complex. kPlain: the commonest real call, with
// variable B and C and transition exp, known when this is compiled.
template <class A_, bool kComplex, bool kPlain_>
struct Form {
  using A = A_;
  using V = Vec<A>;
  static constexpr bool kPlain = kPlain_;
  static constexpr int kParts = kComplex ? 2 : 1;
  static constexpr int64_t kWidth = kParts * kLanes<A>;  // accumulators in a number

  template <bool kPair, class U>
  struct NumberOf {
    using type = U;
  };
  template <class U>
  struct NumberOf<true, U> {
    using type = Complex<U>;
  };
  using Number = typename NumberOf<kComplex, V>::type;

  static Number load(const A* p) {
    if constexpr (kComplex)
      return {seqkern::load<A>(p), seqkern::load<A>(p + kLanes<A>)};
    else
      return seqkern::load<A>(p);
  }
  static void store(A* p, Number x) {
    if constexpr (kComplex)
      seqkern::store<A>(p, x.re), seqkern::store<A>(p + kLanes<A>, x.im);
    else
      seqkern::store<A>(p, x);
  }
  // The same number in all lanes; its imaginary part lies at p[im].
  static Number broadcast(const A* p, int64_t im) {
    if constexpr (kComplex)
      return {splat(p[0]), splat(p[im])};
    else
      return splat(p[0]);
  }
};

// body.template operator()<F>() with the form of a call.
template <class Body>
inline void visit_form(DType accumulator, bool complex, bool plain, const Body& body) {
  const bool fp64 = accumulator == DType::kFloat64;
  if (fp64 && complex) return body.template operator()<Form<double, true, false>>();
  if (fp64) return body.template operator()<Form<double, false, false>>();
  if (complex) return body.template operator()<Form<float, true, false>>();
  if (!plain) return body.template operator()<Form<float, false, false>>();
  return body.template operator()<Form<float, false, true>>();
}

}  // namespace
}  // namespace seqkern::selective_scan

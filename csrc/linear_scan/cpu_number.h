// Numbers of the channels that a loop advances together: a unit of two vectors in memory. Internal to cpu.cpp.
#pragma once
#include "common/affine.h"

namespace seqkern::linear_scan {
namespace {

using seqkern::conj, seqkern::madd, seqkern::product;  // of vectors

// Real numbers of two vectors of channels.
template <class V>
struct Pair {
  V lo, hi;
};
template <class V>
inline Pair<V> conj(Pair<V> x) {
  return x;
}
template <class V>
inline Pair<V> product(Pair<V> x, Pair<V> y) {
  return {x.lo * y.lo, x.hi * y.hi};
}
template <class V>
inline Pair<V> madd(Pair<V> x, Pair<V> y, Pair<V> z) {
  return {madd(x.lo, y.lo, z.lo), madd(x.hi, y.hi, z.hi)};
}
template <class V>
inline Pair<V> operator+(Pair<V> x, Pair<V> y) {
  return {x.lo + y.lo, x.hi + y.hi};
}

// [decay]
template <class V>
inline Pair<V> exp(Pair<V> x) {
  return {exp2(scaled(x.lo)), exp2(scaled(x.hi))};
}
template <class V>
inline Complex<V> exp(Complex<V> x) {
  return exp_of_scaled(V{} + 1, scaled(x));
}

// x, but 0 where a is: not NaN, whatever x is.
template <class V>
inline Pair<V> zero_where_zero(Pair<V> a, Pair<V> x) {
  return {select(a.lo == 0, V{}, x.lo), select(a.hi == 0, V{}, x.hi)};
}
template <class V>
inline Complex<V> zero_where_zero(Complex<V> a, Complex<V> x) {
  const auto zero = (a.re == 0) & (a.im == 0);
  return {select(zero, V{}, x.re), select(zero, V{}, x.im)};
}

template <class V>
inline V where_finite(V x, V y) {
  return select(x - x == 0, x, y);
}
// Of each channel: x if it is finite, else y.
template <class V>
inline Pair<V> where_finite(Pair<V> x, Pair<V> y) {
  return {where_finite(x.lo, y.lo), where_finite(x.hi, y.hi)};
}
template <class V>
inline Complex<V> where_finite(Complex<V> x, Complex<V> y) {
  const auto finite = (x.re - x.re == 0) & (x.im - x.im == 0);
  return {select(finite, x.re, y.re), select(finite, x.im, y.im)};
}

// Whether a unit has all its elements, or the first n.
struct Whole {};
struct Part {
  int n;
};

// What a call computes with: accumulators A, in pairs where numbers are complex.
template <class A_, bool kComplex>
struct Form {
  using A = A_;
  using V = Vec<A>;
  static constexpr int kParts = kComplex ? 2 : 1;
  static constexpr int kUnit = 2 * kLanes<A>;  // elements of memory

  template <bool, class U>
  struct NumberOf {
    using type = Pair<U>;
  };
  template <class U>
  struct NumberOf<true, U> {
    using type = Complex<U>;
  };
  using Number = typename NumberOf<kComplex, V>::type;

  // Elements of a unit in memory at p: all, or the first n and zeros.
  template <class T>
  [[gnu::always_inline]] static Number load(const T* p, Whole = {}) {
    return of_rows(seqkern::load<A>(p), seqkern::load<A>(p + kLanes<A>));
  }
  template <class T>
  [[gnu::always_inline]] static Number load(const T* p, Part part) {
    if (part.n <= kLanes<A>) return of_rows(seqkern::load<A>(p, part.n), V{});
    return of_rows(seqkern::load<A>(p), seqkern::load<A>(p + kLanes<A>, part.n - kLanes<A>));
  }
  // One number for all channels.
  template <class T>
  static Number broadcast(const T* p) {
    const V x = splat(static_cast<A>(widen(p[0])));
    if constexpr (kComplex)
      return {x, splat(static_cast<A>(widen(p[1])))};
    else
      return {x, x};
  }

  template <class T>
  [[gnu::always_inline]] static void store(T* p, Number x, Whole = {}) {
    V rows[2];
    to_rows(x, rows);
    seqkern::store<A>(p, rows[0]), seqkern::store<A>(p + kLanes<A>, rows[1]);
  }
  template <class T>
  [[gnu::always_inline]] static void store(T* p, Number x, Part part) {
    V rows[2];
    to_rows(x, rows);
    if (part.n <= kLanes<A>) return seqkern::store<A>(p, rows[0], part.n);
    seqkern::store<A>(p, rows[0]), seqkern::store<A>(p + kLanes<A>, rows[1], part.n - kLanes<A>);
  }

  // In scratch memory, whole units: parts of complex numbers lie apart.
  static Number get(const A* p) { return {seqkern::load<A>(p), seqkern::load<A>(p + kLanes<A>)}; }
  static void put(A* p, Number x) {
    if constexpr (kComplex)
      seqkern::store<A>(p, x.re), seqkern::store<A>(p + kLanes<A>, x.im);
    else
      seqkern::store<A>(p, x.lo), seqkern::store<A>(p + kLanes<A>, x.hi);
  }
  static Number one() {
    if constexpr (kComplex)
      return {V{} + 1, V{}};
    else
      return {V{} + 1, V{} + 1};
  }

  // The sum over channels.
  static void store_sum(A* to, Number x) {
    if constexpr (kComplex)
      to[0] = sum_of_lanes<A>(x.re), to[1] = sum_of_lanes<A>(x.im);
    else
      to[0] = sum_of_lanes<A>(x.lo + x.hi);
  }

 private:
  static Number of_rows(V first, V second) {
    if constexpr (kComplex) {
      const V rows[2] = {first, second};
      V columns[2];
      split_columns<2, A>(rows, columns);
      return {columns[0], columns[1]};
    } else {
      return {first, second};
    }
  }
  static void to_rows(Number x, V* rows) {
    if constexpr (kComplex)
      interleave<A>(x.re, x.im, rows);
    else
      rows[0] = x.lo, rows[1] = x.hi;
  }
};

// body.template operator()<F>() with the form of a call.
template <class Body>
inline void visit_form(DType accumulator, bool complex, const Body& body) {
  const bool fp64 = accumulator == DType::kFloat64;
  if (fp64 && complex) return body.template operator()<Form<double, true>>();
  if (fp64) return body.template operator()<Form<double, false>>();
  if (complex) return body.template operator()<Form<float, true>>();
  return body.template operator()<Form<float, false>>();
}

}  // namespace
}  // namespace seqkern::linear_scan

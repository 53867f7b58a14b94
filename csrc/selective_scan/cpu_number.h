// Numbers of kLanes<A> channels: a vector, or a pair of them where A is complex. Internal to cpu.cpp.
#pragma once
#include "common/simd_complex.h"

namespace seqkern::selective_scan {
namespace {

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

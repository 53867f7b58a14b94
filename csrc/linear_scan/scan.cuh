// What forward and backward share on the device: decays, and affine maps as elements of a scan (common/time_scan.cuh).
#pragma once

#include "common/affine.h"
#include "common/time_scan.cuh"
#include "linear_scan/tile.h"

namespace seqkern::linear_scan::cuda {

template <typename R, bool kComplex>
using Scalar = std::conditional_t<kComplex, Complex<R>, R>;

template <typename R>
__device__ __forceinline__ bool is_zero(R x) {
  return x == R(0);
}
template <typename R>
__device__ __forceinline__ bool is_zero(Complex<R> x) {
  return x.re == R(0) && x.im == R(0);
}

__device__ __forceinline__ float exp_full(float x) {
  return expf(x);
}
__device__ __forceinline__ double exp_full(double x) {
  return exp(x);
}

// By half turns, whose reduction is exact. What rounding takes from them is put back: an error of the angle adds up
// over time.
template <typename R>
__device__ __forceinline__ Complex<R> exp_full(Complex<R> x) {
  constexpr bool kFloat = sizeof(R) == 4;
  constexpr R kPi = R(3.1415926535897931), kInverse = R(0.31830988618379067);
  constexpr R kRest = kFloat ? R(1.284127663e-08) : R(-1.96786766751824859e-17);  // 1 / pi - kInverse
  const R size = exp_full(x.re), half_turns = x.im * kInverse;
  if (size == R(0)) return {};  // whatever the angle
  const R rest = kPi * fma(x.im, kRest, fma(x.im, kInverse, -half_turns));
  R sine, cosine;
  if constexpr (kFloat)
    sincospif(half_turns, &sine, &cosine);
  else
    sincospi(half_turns, &sine, &cosine);
  return {size * fma(-rest, sine, cosine), size * fma(rest, cosine, sine)};
}

// a_t of what is given [decay].
template <typename S>
__device__ __forceinline__ S decay(S given, bool log_space) {
  return log_space ? exp_full(given) : given;
}
template <typename S, int kTokens>
__device__ __forceinline__ void take_decays(S (&a)[kTokens], const time_scan::Fetched<S, kTokens>& fetched,
                                            const time_scan::Line& line, bool log_space) {
  fetched.decode(line, [&](int i, S given) { a[i] = given; });
  if (!log_space) return;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) a[i] = exp_full(a[i]);
}

// Tokens of a tensor as one lane sees them.
__device__ __forceinline__ time_scan::Line line_of(const Data& x, const Sequences& s, const time_scan::Place& place) {
  return {{x.data, x.dtype}, place.b * x.stride.b + place.channel * x.stride.d, x.stride.l, s, place.exists};
}

// Several tokens as a map of the state. Decays may have grown to inf over them: what is zero stays zero then, as it
// would token by token. (A decay that is not finite by itself has made NaN of what the tokens add as well.)
template <typename S>
struct Maps {
  using Element = Affine<S>;
  using Carry = S;
  using Real = seqkern::Real<S>;

  __device__ __forceinline__ static Element identity() { return seqkern::identity<S>(S(Real(1))); }
  __device__ __forceinline__ static Carry apply(const Element& f, Carry h) {
    return is_zero(h) ? f.b : seqkern::apply(f, h);
  }
  __device__ __forceinline__ static Element compose(const Element& later, const Element& earlier) {
    Element both = seqkern::compose(later, earlier);
    both.b = apply(later, earlier.b);
    return both;
  }
};

// Launches that forward and backward share. Of rows whose sequence has no tokens `to` (sequences.count, D, parts)
// becomes `from`, or zero where that is absent.
void clear_flags(const time_scan::Cut& cut, void* workspace, Stream stream);
void pass_states(const Inputs& in, const Array& from, const Array& to, Stream stream);

}  // namespace seqkern::linear_scan::cuda

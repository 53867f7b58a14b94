// Functions of vectors, for CPU kernels: see simd.h.
#pragma once
#include "common/simd.h"

namespace seqkern {
namespace {

// (2^fraction - 1) / fraction to 8e-7 of its value, for a fraction in [-0.5, 0.5]: minimax.
inline Float exp2_slope(Float fraction) {
  Float p = madd(splat(1.326472712e-3f), fraction, splat(9.671512645e-3f));
  p = madd(p, fraction, splat(5.550733743e-2f));
  p = madd(p, fraction, splat(0.2402224209f));
  return madd(p, fraction, splat(0.6931469776f));
}

// 2^(whole + fraction) to 3e-7 of its value, exact where fraction is 0. `whole` is an integer (at most 252 in
// magnitude, without AVX-512), fraction in [-0.5, 0.5].
inline Float exp2_of_parts(Float whole, Float fraction) {
  const Float p = madd(exp2_slope(fraction), fraction, splat(1.f));
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(kAll, p, whole);
#else
  const Int n = __builtin_convertvector(whole, Int);
  const Int half = n >> 1;  // two factors: 2^n itself may be out of range
  return p * bit_cast<Float>((half + 127) << 23) * bit_cast<Float>((n - half + 127) << 23);
#endif
}

// 2^x to 3e-7 of its value, exact at integers; inf where it overflows, 0 or subnormal where it underflows.
inline Float exp2(Float x) {
#if defined(__AVX512F__)
  const Float fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // 0 for +-inf
  return exp2_of_parts(x - fraction, fraction);
#else
  x = x > 252.f ? splat(252.f) : x;  // beyond, 2^x is inf or 0; false for NaN, which stays
  x = x < -252.f ? splat(-252.f) : x;
  const Float whole = (x + 0x1.8p23f) - 0x1.8p23f;
  return exp2_of_parts(whole, x - whole);
#endif
}

inline Double exp2(Double x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

template <class A>
constexpr A kLog2E = static_cast<A>(1.4426950408889634);  // exp(x) = 2^(kLog2E x)

// 1 / x for x >= 1, to 1.2e-7 of its value.
inline Float reciprocal(Float x) {
#if defined(__AVX512F__)
  const Float r = _mm512_maskz_rcp14_ps(kAll, x);
  const Float better = madd(madd(-x, r, splat(1.f)), r, r);
  return x > 0x1p125f ? r : better;
#else
  return 1.f / x;
#endif
}

// Rounded to nearest.
inline Float sqrt(Float x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(kAll, x);
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
inline Double sqrt(Double x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

// exp(x) to 3e-7 of its value, for any x <= 0. exp(0) is 1.
[[gnu::always_inline]] inline Float exp_of_negative(Float x) {
  x = x < -110.f ? splat(-110.f) : x;  // exp is 0 below; false for NaN, which stays
  const Float whole = (x * kLog2E<float> + 0x1.8p23f) - 0x1.8p23f;
  Float rest = madd(whole, splat(-0.693359375f), x);  // x - log(2) whole; this product is exact
  rest = madd(whole, splat(2.12194440e-4f), rest);
  return exp2_of_parts(whole, rest * kLog2E<float>);
}
inline Double exp_of_negative(Double x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// log(1 + exp(x)), above 20 x itself: to 4e-7 of its value.
[[gnu::always_inline]] inline Float softplus(Float x) {
  const Float e = exp_of_negative(x < 0 ? x : -x);
  // log(1 + e) = 2 atanh(s) = 2 s + s^3 (2/3 + 2/5 s^2 + ...), minimax for e in [0, 1]
  const Float s = e * reciprocal(e + 2.f), q = s * s;
  Float p = madd(splat(0.280244588f), q, splat(0.279991411f));
  p = madd(p, q, splat(0.400216991f));
  p = madd(p, q, splat(0.666664131f));
  const Float log = madd(s * q, p, s + s);
  return x > 20.f ? x : log + (x > 0 ? x : Float{});
}
inline Double softplus(Double x) {
  for (int i = 0; i < kLanes<double>; ++i)
    if (!(x[i] > 20)) x[i] = __builtin_log1p(__builtin_exp(x[i]));
  return x;
}

inline void sincos_by_lane(Double x, Double& sin, Double& cos) {
  sin = cos = x;
  for (int i = 0; i < kLanes<double>; ++i) sin[i] = __builtin_sin(x[i]), cos[i] = __builtin_cos(x[i]);
}
inline void sincos_by_lane(Float x, Float& sin, Float& cos) {
  sin = cos = x;
  for (int i = 0; i < kLanes<float>; ++i)
    sin[i] = static_cast<float>(__builtin_sin(static_cast<double>(x[i]))),
    cos[i] = static_cast<float>(__builtin_cos(static_cast<double>(x[i])));
}

// sin(x) and cos(x) to 1.2e-7.
inline void sincos(Float x, Float& sin, Float& cos) {
  const Float magnitude = x < 0 ? -x : x;
  const Int outside = ~(magnitude <= 8192.f);  // where the reduction is not exact; NaN too
  bool any = false;
  for (int i = 0; i < kLanes<float>; ++i) any |= outside[i] != 0;
  if (any) return sincos_by_lane(x, sin, cos);

  // x = quarter pi/2 + r; pi/2 in parts whose products with `quarter` are exact
  const Float quarter = (x * 0.636619772f + 0x1.8p23f) - 0x1.8p23f;
  Float r = madd(quarter, splat(-1.5703125f), x);
  r = madd(quarter, splat(-0x1.fb4p-12f), r);
  r = madd(quarter, splat(-0x1.4442d2p-24f), r);
  const Float q = r * r;
  Float s = madd(splat(-1.95090633e-4f), q, splat(8.33211851e-3f));
  s = madd(s, q, splat(-0.16666654f));
  s = madd(r * q, s, r);
  Float c = madd(splat(2.44292128e-5f), q, splat(-1.38872889e-3f));
  c = madd(c, q, splat(4.16666453e-2f));
  c = madd(q * q, c, madd(q, splat(-0.5f), splat(1.f)));

  const Int n = __builtin_convertvector(quarter, Int);
  const Int odd = -(n & 1);  // all bits set where sin and cos change places
  const Float sine = select(odd, c, s), cosine = select(odd, s, c);
  sin = bit_cast<Float>(bit_cast<Int>(sine) ^ ((n & 2) << 30));
  cos = bit_cast<Float>(bit_cast<Int>(cosine) ^ (((n + 1) & 2) << 30));
}
inline void sincos(Double x, Double& sin, Double& cos) {
  sincos_by_lane(x, sin, cos);
}

constexpr float kMinusLog2E = -kLog2E<float>;
inline Float sigmoid(Float x) {
  return reciprocal(exp2(x * kMinusLog2E) + 1.f);
}

inline Double sigmoid(Double x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = 1. / (1. + __builtin_exp(-x[i]));
  return x;
}

// tanh(x) = E / (E + 2) with E = exp(2 x) - 1: to 1e-6 of its value, and to 2e-7; at most 1.
[[gnu::always_inline]] inline Float tanh(Float x) {
  const Int bits = bit_cast<Int>(x), sign = bits & static_cast<int32_t>(0x80000000u);
  const Float magnitude = bit_cast<Float>(bits ^ sign);
  const Float scaled = (magnitude > 10.f ? splat(10.f) : magnitude) * (2 * kLog2E<float>);  // NaN stays
#if defined(__AVX512F__)
  const Float fraction = _mm512_maskz_reduce_ps(kAll, scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Float power = _mm512_maskz_scalef_ps(kAll, splat(1.f), scaled - fraction);
#else
  const Float whole = (scaled + 0x1.8p23f) - 0x1.8p23f, fraction = scaled - whole;
  const Float power = bit_cast<Float>((__builtin_convertvector(whole, Int) + 127) << 23);
#endif
  const Float slope = exp2_slope(fraction), rest = power * fraction;
  const Float tanh = madd(rest, slope, power - 1.f) / madd(rest, slope, power + 1.f);
  return bit_cast<Float>(bit_cast<Int>(tanh) | sign);
}
inline Double tanh(Double x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

// silu(x) = x sigmoid(x), and its derivative. As in torch, -inf gives NaN.
inline Float silu(Float x) {
  return x * sigmoid(x);
}
inline Double silu(Double x) {
  return x * sigmoid(x);
}
template <class V>
inline V silu_derivative(V x) {
  const V s = sigmoid(x);
  return s * madd(x, 1 - s, V{} + 1);
}

// silu(x) for an 8-bit significand, given scaled = kSiluScale x: to 2.2e-4 of its value. With E = 2^scaled it is
// x / (1 + E^2) = scaled / (kSiluScale + kSiluScale E^2); the scale is below 1, so scaled does not overflow.
constexpr float kSiluScale = 0.5f * kMinusLog2E;
inline Float silu_of_scaled(Float scaled) {
#if defined(__AVX512F__)
  const Float fraction = _mm512_reduce_ps(scaled, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Float p = madd(splat(0.0662679258f), fraction, splat(0.192003767f));  // minimax on [0, 1) of sqrt(-kSiluScale) 2^f
  p = madd(p, fraction, splat(0.590986595f));
  p = madd(p, fraction, splat(0.849258288f));
  const Float exp = _mm512_maskz_scalef_ps(kAll, p, scaled);
  return scaled * Float(_mm512_maskz_rcp14_ps(kAll, madd(-exp, exp, splat(kSiluScale))));
#else
  const Float exp = exp2(scaled);
  return scaled / madd(exp * exp, splat(kSiluScale), splat(kSiluScale));
#endif
}

}  // namespace
}  // namespace seqkern

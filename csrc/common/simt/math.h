// CUDA's arithmetic intrinsics. Those that are approximate on a device are exact here.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/simt/types.h"

using std::max;
using std::min;

inline float rsqrtf(float x) {
  return 1.0f / sqrtf(x);
}
inline double rsqrt(double x) {
  return 1.0 / sqrt(x);
}
// sin(pi x), cos(pi x): the reduction to [-1, 1] is exact.
inline void sincospi(double x, double* sine, double* cosine) {
  const double angle = 3.14159265358979323846 * (x - 2.0 * rint(0.5 * x));
  *sine = sin(angle), *cosine = cos(angle);
}
inline void sincospif(float x, float* sine, float* cosine) {
  double s, c;
  sincospi(static_cast<double>(x), &s, &c);
  *sine = static_cast<float>(s), *cosine = static_cast<float>(c);
}
inline float __expf(float x) {
  return expf(x);
}
inline float __logf(float x) {
  return logf(x);
}
inline float __log2f(float x) {
  return log2f(x);
}
inline float __sinf(float x) {
  return sinf(x);
}
inline float __cosf(float x) {
  return cosf(x);
}
inline float __powf(float x, float y) {
  return powf(x, y);
}
inline float __fdividef(float x, float y) {
  return x / y;
}
inline float __fdiv_rn(float x, float y) {
  return x / y;
}
inline float __frcp_rn(float x) {
  return 1.0f / x;
}
inline float __fsqrt_rn(float x) {
  return sqrtf(x);
}
inline float __fadd_rn(float x, float y) {
  return x + y;
}
inline float __fmul_rn(float x, float y) {
  return x * y;
}
inline float __fmaf_rn(float x, float y, float z) {
  return fmaf(x, y, z);
}
inline float __saturatef(float x) {
  return x > 0.0f ? fminf(x, 1.0f) : 0.0f;
}

inline unsigned __float_as_uint(float x) {
  return seqkern::simt::bits_of(x);
}
inline int __float_as_int(float x) {
  return static_cast<int>(seqkern::simt::bits_of(x));
}
inline float __uint_as_float(unsigned x) {
  return seqkern::simt::float_of(x);
}
inline float __int_as_float(int x) {
  return seqkern::simt::float_of(static_cast<unsigned>(x));
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}

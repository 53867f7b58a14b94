// Affine maps h -> a h + b of a state of kSize numbers: what scans over linear recurrences combine, on the CPU, on CUDA
// and between the chunks of a Newton solve. A number S is real or complex, of one channel or a vector of them.
#pragma once

#include "common/number.h"

namespace seqkern {
namespace {

template <class S, int kSize = 1>
struct Affine {
  S a[kSize][kSize];
  S b[kSize];
};

// One number: the recurrence of linear_scan, h_t = a_t h_{t-1} + b_t.
template <class S>
struct Affine<S, 1> {
  S a, b;
};

template <class S>
SEQKERN_FUNCTION S apply(const Affine<S, 1>& f, S h) {
  return madd(f.a, h, f.b);
}

// First `earlier`, then `later`. Associative up to rounding: callers fix the order.
template <class S>
SEQKERN_FUNCTION Affine<S, 1> compose(const Affine<S, 1>& later, const Affine<S, 1>& earlier) {
  const S zero{};
  return {madd(later.a, earlier.a, zero), madd(later.a, earlier.b, later.b)};
}

// Blocks: a state of several numbers, as cells with (h, c) or (h, c, n) have.

template <class S, int kSize>
SEQKERN_FUNCTION void apply(const Affine<S, kSize>& f, S (&h)[kSize]) {
  S next[kSize];
  for (int i = 0; i < kSize; ++i) {
    next[i] = f.b[i];
    for (int j = 0; j < kSize; ++j) next[i] = madd(f.a[i][j], h[j], next[i]);
  }
  for (int i = 0; i < kSize; ++i) h[i] = next[i];
}

template <class S, int kSize>
SEQKERN_FUNCTION Affine<S, kSize> compose(const Affine<S, kSize>& later, const Affine<S, kSize>& earlier) {
  Affine<S, kSize> f;
  for (int i = 0; i < kSize; ++i) {
    f.b[i] = later.b[i];
    for (int k = 0; k < kSize; ++k) f.b[i] = madd(later.a[i][k], earlier.b[k], f.b[i]);
    for (int j = 0; j < kSize; ++j) {
      f.a[i][j] = S{};
      for (int k = 0; k < kSize; ++k) f.a[i][j] = madd(later.a[i][k], earlier.a[k][j], f.a[i][j]);
    }
  }
  return f;
}

// h -> h, of numbers whose one is `one`.
template <class S, int kSize = 1>
SEQKERN_FUNCTION Affine<S, kSize> identity(S one) {
  Affine<S, kSize> f{};
  if constexpr (kSize == 1) {
    f.a = one;
  } else {
    for (int i = 0; i < kSize; ++i) f.a[i][i] = one;
  }
  return f;
}

}  // namespace
}  // namespace seqkern

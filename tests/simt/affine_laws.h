// What holds of the affine maps of common/affine.h, whatever their numbers S are: exactly, where these are small
// integers. Whoever includes this says first, for each S, what set(S&, int), product(S, S) and same(S, S) are.
#pragma once

#include "case.h"
#include "common/affine.h"

namespace {

using namespace seqkern;

// A state, or what belongs to each number of one.
template <typename S, int kSize>
struct State {
  S x[kSize];
};

template <typename S, int kSize>
__device__ S& factor(Affine<S, kSize>& f, int i, int j) {
  if constexpr (kSize == 1)
    return f.a;
  else
    return f.a[i][j];
}
template <typename S, int kSize>
__device__ S& summand(Affine<S, kSize>& f, int i) {
  if constexpr (kSize == 1)
    return f.b;
  else
    return f.b[i];
}

template <typename S, int kSize>
__device__ State<S, kSize> image(const Affine<S, kSize>& f, State<S, kSize> h) {
  if constexpr (kSize == 1)
    h.x[0] = apply(f, h.x[0]);
  else
    apply(f, h.x);
  return h;
}

// Of different seeds: different ones.
template <typename S>
__device__ S integer(int seed) {
  S x;
  set(x, seed * 7 % 11 - 5);
  return x;
}
template <typename S, int kSize>
__device__ State<S, kSize> some_state(int seed) {
  State<S, kSize> h;
  for (int i = 0; i < kSize; ++i) h.x[i] = integer<S>(seed + 3 * i);
  return h;
}
template <typename S, int kSize>
__device__ Affine<S, kSize> some_map(int seed) {
  Affine<S, kSize> f;
  for (int i = 0; i < kSize; ++i) {
    summand(f, i) = integer<S>(seed + 5 * i);
    for (int j = 0; j < kSize; ++j) factor(f, i, j) = integer<S>(seed + 1 + 2 * i + 7 * j);
  }
  return f;
}

template <typename S, int kSize>
__device__ bool equal(State<S, kSize> x, State<S, kSize> y) {
  bool all = true;
  for (int i = 0; i < kSize; ++i) all = all && same(x.x[i], y.x[i]);
  return all;
}
template <typename S, int kSize>
__device__ bool equal(Affine<S, kSize> f, Affine<S, kSize> g) {
  bool all = true;
  for (int i = 0; i < kSize; ++i) {
    all = all && same(summand(f, i), summand(g, i));
    for (int j = 0; j < kSize; ++j) all = all && same(factor(f, i, j), factor(g, i, j));
  }
  return all;
}

constexpr int kLaws = 5;

// Whether each law holds, of maps and a state that the seed picks.
template <typename S, int kSize>
__device__ void test_laws(int seed, int* holds) {
  Affine<S, kSize> f = some_map<S, kSize>(seed);
  const Affine<S, kSize> g = some_map<S, kSize>(seed + 2), k = some_map<S, kSize>(3 * seed + 1);
  const State<S, kSize> h = some_state<S, kSize>(seed + 4);
  S one;
  set(one, 1);
  const Affine<S, kSize> unit = identity<S, kSize>(one);

  State<S, kSize> sum;
  for (int i = 0; i < kSize; ++i) {
    sum.x[i] = summand(f, i);
    for (int j = 0; j < kSize; ++j) sum.x[i] = sum.x[i] + product(factor(f, i, j), h.x[j]);
  }
  holds[0] = equal(image(f, h), sum);
  holds[1] = equal(image(compose(g, f), h), image(g, image(f, h)));
  holds[2] = equal(compose(compose(k, g), f), compose(k, compose(g, f)));
  holds[3] = equal(image(unit, h), h);
  holds[4] = equal(compose(unit, f), f) && equal(compose(f, unit), f);
}

constexpr const char* kLawNames[kLaws] = {"apply is a h + b", "compose is one after the other", "associativity",
                                          "identity", "neutral element"};

}  // namespace

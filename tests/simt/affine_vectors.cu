// common/affine.h as the CPU kernels see it: each number is a vector.
#include "case.h"

#undef SEQKERN_EMULATE
#include "common/simd_complex.h"

namespace {

template <typename V>
void set(V& x, int value) {
  for (int i = 0; i < static_cast<int>(sizeof x / sizeof x[0]); ++i) x[i] = value == 1 ? 1 : (value + i) % 4;
}
template <typename V>
void set(seqkern::Complex<V>& x, int value) {
  set(x.re, value);
  x.im = value == 1 ? V{} : 3 - x.re;
}
template <typename V>
bool same(V x, V y) {
  bool all = true;
  for (int i = 0; i < static_cast<int>(sizeof x / sizeof x[0]); ++i) all = all && x[i] == y[i];
  return all;
}
template <typename V>
bool same(seqkern::Complex<V> x, seqkern::Complex<V> y) {
  return same(x.re, y.re) && same(x.im, y.im);
}

}  // namespace

#include "affine_laws.h"

namespace {

template <typename S>
void run() {
  for (int seed = 0; seed < 32; ++seed) {
    int holds[3][kLaws];
    test_laws<S, 1>(seed, holds[0]);
    test_laws<S, 2>(seed, holds[1]);
    test_laws<S, 3>(seed, holds[2]);
    for (const auto& of_size : holds)
      for (int law = 0; law < kLaws; ++law) expect(kLawNames[law], of_size[law] == 1);
  }
}

const Case affine_vectors("affine_vectors", run<Float>);
const Case affine_double_vectors("affine_double_vectors", run<Double>);
const Case affine_complex_vectors("affine_complex_vectors", run<Complex<Float>>);

}  // namespace

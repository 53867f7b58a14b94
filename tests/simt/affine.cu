// common/affine.h in kernels: real and complex numbers, and blocks of them.
#include "common/complex.cuh"

namespace {

template <typename R>
__device__ void set(R& x, int value) {
  x = static_cast<R>(value);
}
template <typename R>
__device__ void set(seqkern::Complex<R>& x, int value) {
  x = {static_cast<R>(value), static_cast<R>(value == 1 ? 0 : value * value % 5)};
}
template <typename S>
__device__ S product(S a, S b) {
  return a * b;
}
__device__ bool same(float x, float y) {
  return x == y;
}
__device__ bool same(double x, double y) {
  return x == y;
}
template <typename R>
__device__ bool same(seqkern::Complex<R> x, seqkern::Complex<R> y) {
  return x.re == y.re && x.im == y.im;
}

}  // namespace

#include "affine_laws.h"

namespace {

template <typename R, bool kComplex, int kSize>
__global__ void test(int* holds) {
  using S = std::conditional_t<kComplex, Complex<R>, R>;
  test_laws<S, kSize>(static_cast<int>(threadIdx.x), holds + threadIdx.x * kLaws);
}

template <typename R, bool kComplex>
void run() {
  Array<int> holds(32 * kLaws);
  const auto expect_all = [&](auto kernel) {
    launch({.name = "affine", .grid = {}, .threads = 32}, kernel, holds.data);
    for (size_t i = 0; i < holds.size; ++i) expect(kLawNames[i % kLaws], holds[i] == 1);
  };
  expect_all(test<R, kComplex, 1>);
  expect_all(test<R, kComplex, 2>);
  expect_all(test<R, kComplex, 3>);
}

const Case affine_float("affine_float", run<float, false>);
const Case affine_double("affine_double", run<double, false>);
const Case affine_complex("affine_complex", run<float, true>);

}  // namespace

// What the solvers that iterate share: products with Jacobians, and how errors are judged.
#pragma once

#include <limits>

#include "elementwise_rnn/walk.cuh"

namespace seqkern::elementwise_rnn::cuda {

// NaN stays.
template <typename R>
__device__ __forceinline__ R larger(R a, R b) {
  return a > b || a != a ? a : b;
}
// Infinite numbers can be equal.
template <typename R>
__device__ __forceinline__ R difference(R a, R b) {
  return a == b ? R(0) : a - b;
}

// sum + row . d, and with the sizes of the row. What is zero adds nothing, not even times inf.
template <typename R, int S>
__device__ __forceinline__ R add_product(R sum, const R (&row)[S], const R (&d)[S]) {
#pragma unroll
  for (int j = 0; j < S; ++j) sum = d[j] == R(0) ? sum : fma(row[j], d[j], sum);
  return sum;
}
template <typename R, int S>
__device__ __forceinline__ R add_sizes(R sum, const R (&row)[S], const R (&d)[S]) {
#pragma unroll
  for (int j = 0; j < S; ++j) sum = d[j] == R(0) ? sum : fma(R(fabs(row[j])), d[j], sum);
  return sum;
}
// The former, where it is finite.
template <typename R, int S>
__device__ __forceinline__ R corrected(R value, const R (&row)[S], const R (&d)[S]) {
  const R sum = add_product(value, row, d);
  return fabs(sum) <= std::numeric_limits<R>::max() ? sum : value;
}

// m = jacobian m; n = the largest |m| so far.
template <typename R, int S>
__device__ __forceinline__ void extend(R (&m)[S][S], R (&n)[S][S], const R (&jacobian)[S][S]) {
#pragma unroll
  for (int j = 0; j < S; ++j) {
    R column[S];
#pragma unroll
    for (int i = 0; i < S; ++i) column[i] = m[i][j];
#pragma unroll
    for (int i = 0; i < S; ++i) {
      m[i][j] = jacobian[i][0] * column[0];
#pragma unroll
      for (int k = 1; k < S; ++k) m[i][j] = fma(jacobian[i][k], column[k], m[i][j]);
      n[i][j] = larger(R(fabs(m[i][j])), n[i][j]);
    }
  }
}

// What rounding adds to a state.
template <typename R>
__device__ __forceinline__ R rounding(R s) {
  return static_cast<R>(rounding_of(kDType<R>)) * R(fabs(s));
}
template <typename R, int S>
__device__ __forceinline__ bool any_error(const R (&e)[S]) {
  bool any = false;
#pragma unroll
  for (int i = 0; i < S; ++i) any |= e[i] != R(0);
  return any;
}

// How large the estimated error of a number may be that goes from `begins` to `ends`.
template <typename R>
__device__ __forceinline__ R allowed(const FwdParams& p, R begins, R ends) {
  if (p.atol >= 0) return static_cast<R>(kAccepted * p.atol);
  const R size = min(R(fabs(begins)), R(fabs(ends)));
  const bool scales = size > R(1) && size <= std::numeric_limits<R>::max();
  return static_cast<R>(kAccepted * tolerance_of(kDType<R>)) * (scales ? size : R(1));
}

}  // namespace seqkern::elementwise_rnn::cuda

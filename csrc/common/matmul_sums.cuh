// Several Products at once, and sums over their rows and columns in a fixed order.
#pragma once

#include "common/matmul.cuh"

namespace seqkern {

// f(row, column, sum, sums of the others there ...) for what this thread holds of products that are cut alike.
template <typename F, typename P, typename... Others>
__device__ __forceinline__ void for_each_of(F&& f, P& product, Others&... others) {
  const int lane = threadIdx.x % kWarpSize;
  const int row = P::first_row() + lane / 4, column = P::first_column() + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < P::kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < P::kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        f(row + m * P::kTileM + i / 2 * 8, column + n * P::kTileN + i % 2, product.value[m][n][i],
          others.value[m][n][i]...);
      }
    }
  }
}

// Sums of f(row, column, value) over the columns of each warp: sums[kWarpsN][kM], one part for each warp of a row.
template <typename P, typename R, int kParts, int kM, typename F>
__device__ __forceinline__ void sum_rows(P& product, R (&sums)[kParts][kM], F&& f) {
  if (!P::has_part()) return;
  const int lane = threadIdx.x % kWarpSize, part = P::first_column() / P::kColumns;
  const int row = P::first_row() + lane / 4, column = P::first_column() + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < P::kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int here = row + m * P::kTileM + half * 8;
      R sum = R(0);
#pragma unroll
      for (int n = 0; n < P::kTilesN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) sum += f(here, column + n * P::kTileN + i, product.value[m][n][2 * half + i]);
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (lane % 4 == 0) sums[part][here] = sum;
    }
  }
}

// Likewise over the rows: sums[kWarpsM][kN].
template <typename P, typename R, int kParts, int kN, typename F>
__device__ __forceinline__ void sum_columns(P& product, R (&sums)[kParts][kN], F&& f) {
  if (!P::has_part()) return;
  const int lane = threadIdx.x % kWarpSize, part = P::first_row() / P::kRows;
  const int row = P::first_row() + lane / 4, column = P::first_column() + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < P::kTilesN; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int here = column + n * P::kTileN + i;
      R sum = R(0);
#pragma unroll
      for (int m = 0; m < P::kTilesM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          sum += f(row + m * P::kTileM + half * 8, here, product.value[m][n][2 * half + i]);
        }
      }
      for (int distance = 4; distance < kWarpSize; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (lane / 4 == 0) sums[part][here] = sum;
    }
  }
}

// The sum over the parts that sum_rows or sum_columns left.
template <typename R, int kParts, int kCount>
__device__ __forceinline__ R sum_parts(const R (&sums)[kParts][kCount], int at) {
  R sum = sums[0][at];
#pragma unroll
  for (int part = 1; part < kParts; ++part) sum += sums[part][at];
  return sum;
}

}  // namespace seqkern

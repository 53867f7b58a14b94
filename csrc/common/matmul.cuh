// Products of matrices that lie in shared memory, by the warps of a block side by side; the sums stay in registers.
//
//   Product<T, 64, 128, 2, 4> d;                     (64, 128), cut for 2 x 4 warps
//   d.clear();
//   d.template add<kPlain, kTransposed>(a, b, 0, depth);   d += a b^T
//   d.for_each([&](int row, int column, auto& sum) { ... });
//   d.store(c);                                      in the operands' type, for the next product
//
// The operands' type T chooses the arithmetic: __nv_bfloat16 tensor cores with fp32 sums; float tensor cores in tf32,
// each number as the sum of two, so that nothing but fp32 rounding is lost; double plain multiplications and additions.
#pragma once

#include "common/array.cuh"
#include "common/mma.cuh"

namespace seqkern {

// (kRows, kColumns) in shared memory. The 16 bytes between rows put neighbouring rows into different banks.
template <typename T, int kRows, int kColumns>
struct alignas(16) Matrix {
  static constexpr int kStride = kColumns + 16 / static_cast<int>(sizeof(T));
  T element[kRows][kStride];

  __device__ __forceinline__ T* operator[](int row) { return element[row]; }
  __device__ __forceinline__ const T* operator[](int row) const { return element[row]; }
};

// A part of a matrix, as an operand.
template <typename M>
struct Part {
  M& matrix;
  int row, column;

  __device__ __forceinline__ auto* operator[](int i) const { return matrix[row + i] + column; }
};

// How an operand lies in memory: as the product reads it, or with rows and columns exchanged.
enum Lie { kPlain, kTransposed };

// Depths of products are multiples of this, and so are the sizes of operands that products are taken of.
template <typename T>
inline constexpr int kDepthStep = sizeof(T) == 2 ? 16 : 8;

namespace detail {

// fp32 as tf32 numbers: x = high + low, to 2^-22 of x.
template <int kCount>
struct Halves {
  uint32_t high[kCount], low[kCount];

  __device__ __forceinline__ void set(int i, float x, bool exact) {
    high[i] = to_tf32(x);
    if (!exact) return;
    float rounded;
    memcpy(&rounded, &high[i], sizeof(rounded));
    low[i] = to_tf32(x - rounded);
  }
};

template <Lie kLie, typename M>
__device__ __forceinline__ auto element(const M& matrix, int row, int column) {
  return kLie == kPlain ? matrix[row][column] : matrix[column][row];
}

}  // namespace detail

// The sums of a product (kM, kN), whose rows are cut for kWarpsM warps and columns for kWarpsN; further warps of the
// block have no part. In a warp, lane 4 g + q holds of each tile (16, 8): rows g and g + 8, columns 2q and 2q + 1.
template <typename T, int kM, int kN, int kWarpsM, int kWarpsN>
struct Product {
  using Sum = Accumulator<T>;
  static constexpr int kTileM = 16, kTileN = 8;
  static constexpr int kRows = kM / kWarpsM, kColumns = kN / kWarpsN;  // of a warp
  static constexpr int kTilesM = kRows / kTileM, kTilesN = kColumns / kTileN;
  static_assert(kTilesM * kTileM * kWarpsM == kM && kTilesN * kTileN * kWarpsN == kN, "whole tiles for every warp");

  Sum value[kTilesM][kTilesN][4];

  __device__ __forceinline__ static int warp() { return threadIdx.x / kWarpSize; }
  __device__ __forceinline__ static bool has_part() { return warp() < kWarpsM * kWarpsN; }
  // The first row and column of this warp.
  __device__ __forceinline__ static int first_row() { return warp() / kWarpsN * kRows; }
  __device__ __forceinline__ static int first_column() { return warp() % kWarpsN * kColumns; }

  __device__ __forceinline__ void clear() {
    for_each([](int, int, Sum& sum) { sum = Sum(0); });
  }

  // f(row, column, sum) for what this thread holds.
  template <typename F>
  __device__ __forceinline__ void for_each(F&& f) {
    for_each_pair([&](int row, int column, Sum& left, Sum& right) {
      f(row, column, left);
      f(row, column + 1, right);
    });
  }

  // f(row, column, sum of this column, sum of the next): for accesses to two elements at once.
  template <typename F>
  __device__ __forceinline__ void for_each_pair(F&& f) {
    if (!has_part()) return;
    const int lane = threadIdx.x % kWarpSize;
    const int row = first_row() + lane / 4, column = first_column() + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          f(row + m * kTileM + i * 4, column + n * kTileN, value[m][n][i], value[m][n][i + 1]);
        }
      }
    }
  }

  // f(row, column, sum, the sum of another product at the same place)
  template <typename F>
  __device__ __forceinline__ void for_each_with(const Product& other, F&& f) {
    const Sum* of_other = &other.value[0][0][0];
    for_each([&](int row, int column, Sum& sum) { f(row, column, sum, *of_other++); });
  }

  template <typename M>
  __device__ __forceinline__ void store(M& to_matrix) {
    for_each_pair([&](int row, int column, Sum left, Sum right) {
      *reinterpret_cast<Vector<T, 2>*>(&to_matrix[row][column]) = {to<T>(left), to<T>(right)};
    });
  }

  // += a (kM, depth) b (depth, kN) for depths in [begin, end), multiples of kDepthStep<T>. Warps may name limits of
  // their own, such as those of a triangular a. `exact` = false: float operands are rounded to tf32.
  template <Lie kA, Lie kB, typename A, typename B>
  __device__ __forceinline__ void add(const A& a, const B& b, int begin, int end, bool exact = true) {
    if (!has_part()) return;
#pragma unroll 1
    for (int depth = begin; depth < end; depth += kDepthStep<T>) {
      if constexpr (sizeof(T) == 2)
        add_half<kA, kB>(a, b, depth);
      else if constexpr (sizeof(T) == 4)
        add_float<kA, kB>(a, b, depth, exact);
      else
        add_double<kA, kB>(a, b, depth);
    }
  }

 private:
  // Lane 8 i + r names row r of the (8, 8) matrix that becomes register i of a fragment (common/mma.cuh).
  template <Lie kA, Lie kB, typename A, typename B>
  __device__ __forceinline__ void add_half(const A& a, const B& b, int depth) {
    const int lane = threadIdx.x % kWarpSize, low = lane % 8, odd = lane / 8 % 2 * 8, upper = lane / 16 * 8;
    uint32_t left[kTilesM][4], right[kTilesN][2];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      const int row = first_row() + m * kTileM + odd + low;
      if constexpr (kA == kPlain)
        load_matrix(left[m], &a[row][depth + upper]);
      else
        load_matrix<true>(left[m], &a[depth + upper + low][first_row() + m * kTileM + odd]);
    }
    constexpr int kPairs = kTilesN / 2;
#pragma unroll
    for (int n = 0; n < 2 * kPairs; n += 2) {
      const int column = first_column() + n * kTileN + upper;
      uint32_t pair[4];
      if constexpr (kB == kPlain)
        load_matrix<true>(pair, &b[depth + odd + low][column]);
      else
        load_matrix(pair, &b[column + low][depth + odd]);
      right[n][0] = pair[0], right[n][1] = pair[1], right[n + 1][0] = pair[2], right[n + 1][1] = pair[3];
    }
    if constexpr (kTilesN % 2 == 1) {
      const int column = first_column() + (kTilesN - 1) * kTileN;
      if constexpr (kB == kPlain)
        load_matrix<true>(right[kTilesN - 1], &b[depth + odd + low][column]);
      else
        load_matrix(right[kTilesN - 1], &b[column + low][depth + odd]);
    }
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) mma_m16n8k16<T>(value[m][n], left[m], right[n]);
    }
  }

  template <Lie kA, Lie kB, typename A, typename B>
  __device__ __forceinline__ void add_float(const A& a, const B& b, int depth, bool exact) {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, q = lane % 4;
    detail::Halves<4> left[kTilesM];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row() + m * kTileM + g + i % 2 * 8;
        left[m].set(i, detail::element<kA>(a, row, depth + q + i / 2 * 4), exact);
      }
    }
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
      detail::Halves<2> right;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        right.set(i, detail::element<kB>(b, depth + q + i * 4, first_column() + n * kTileN + g), exact);
      }
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        if (exact) {  // the small terms first
          mma_m16n8k8_tf32(value[m][n], left[m].low, right.high);
          mma_m16n8k8_tf32(value[m][n], left[m].high, right.low);
        }
        mma_m16n8k8_tf32(value[m][n], left[m].high, right.high);
      }
    }
  }

  template <Lie kA, Lie kB, typename A, typename B>
  __device__ __forceinline__ void add_double(const A& a, const B& b, int depth) {
#pragma unroll 1
    for (int k = depth; k < depth + kDepthStep<T>; ++k) {
      for_each([&](int row, int column, Sum& sum) {
        sum += detail::element<kA>(a, row, k) * detail::element<kB>(b, k, column);
      });
    }
  }
};

// How many warps a product is cut for in each direction: tiles of a warp are as square as they can be.
struct WarpGrid {
  int m, n;
};
constexpr WarpGrid warp_grid(int rows, int columns, int warps) {
  WarpGrid grid{1, 1};
  while (grid.m * grid.n < warps) {
    const int m = rows / grid.m, n = columns / grid.n;  // of a warp
    if (n >= 16 && (n >= m || m < 32))
      grid.n *= 2;
    else if (m >= 32)
      grid.m *= 2;
    else
      break;
  }
  return grid;
}

template <typename T, int kM, int kN, int kWarps>
using BlockProduct = Product<T, kM, kN, warp_grid(kM, kN, kWarps).m, warp_grid(kM, kN, kWarps).n>;

}  // namespace seqkern

// Products of matrices in which the order of every sum is fixed.
#include "common/async.cuh"
#include "common/grid.cuh"
#include "common/launch.h"
#include "common/matmul.cuh"
#include "rnn/stepwise.h"

namespace seqkern::rnn::cuda {
namespace {

using Side = ProductParams::Side;

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
// What a block makes: products of a token have few rows, so that small tiles make more blocks.
constexpr int kSize = 32;  // rows and columns
template <typename T>
constexpr int kDepth = 128 / static_cast<int>(sizeof(T));
constexpr int kStages = 4;  // pieces of the depth that are in shared memory or on their way to it

template <typename T, bool kLinesAreDepth>
using SideTile = Matrix<T, kLinesAreDepth ? kDepth<T> : kSize, kLinesAreDepth ? kSize : kDepth<T>>;

template <typename T, bool kLeftTransposed, bool kRightTransposed>
struct Stage {
  SideTile<T, kLeftTransposed> left;
  SideTile<T, !kRightTransposed> right;
};

// A side of one head, as its pieces are taken.
template <typename T>
struct Source {
  const ProductParams& p;
  const Side& side;
  int64_t first;          // element of the head
  int64_t lines, length;  // how many there are, and elements of each
  bool indexed;           // lines are named by p.line_indices
  bool whole;             // elements of type T, in aligned vectors

  __device__ __forceinline__ Source(const ProductParams& params, const Side& side_, int64_t head, int64_t lines_,
                                    int64_t length_, bool indexed_)
      : p(params), side(side_), first(head * side_.h), lines(lines_), length(length_), indexed(indexed_) {
    const uintptr_t bits = reinterpret_cast<uintptr_t>(side.data) | first * sizeof(T) | side.line * sizeof(T);
    whole = side.dtype == kDType<T> && side.element == 1 && bits % alignof(Vector<T, kVectorCount<T>>) == 0;
  }

  // Where a line begins, -1: nowhere.
  __device__ __forceinline__ int64_t begin(int64_t line) const {
    if (line >= lines) return -1;
    if (indexed) {
      line = p.line_indices_is_int64 ? load(static_cast<const int64_t*>(p.line_indices) + line)
                                     : load(static_cast<const int32_t*>(p.line_indices) + line);
      if (line < 0 || line >= p.lines) return -1;
    }
    return first + line * side.line;
  }

  // Starts to bring elements from (line, element) on into shared memory; those that do not exist are zero.
  template <int kLines, int kElements>
  __device__ __forceinline__ void fetch(Matrix<T, kLines, kElements>& to_matrix, int64_t line, int64_t element) const {
    constexpr int kVector = kVectorCount<T>, kVectors = kElements / kVector;
#pragma unroll 1
    for (int i = threadIdx.x; i < kLines * kVectors; i += kThreads) {
      T* const slot = &to_matrix[i / kVectors][i % kVectors * kVector];
      const int64_t column = element + i % kVectors * kVector, of_line = begin(line + i / kVectors);
      const int valid = of_line < 0 ? 0 : static_cast<int>(max(int64_t{0}, min(length - column, int64_t{kVector})));
      if (whole) {
        const T* const data = static_cast<const T*>(side.data) + (valid > 0 ? of_line + column : 0);
        copy_async<16>(slot, data, valid * static_cast<int>(sizeof(T)));
        continue;
      }
      const Array array{const_cast<void*>(side.data), side.dtype};
#pragma unroll 1
      for (int k = 0; k < kVector; ++k)
        slot[k] = k < valid ? load<T>(array, of_line + (column + k) * side.element) : static_cast<T>(0.0f);
    }
  }
};

// out = left right for every head
// block    a tile of one head's rows and columns
// warp     a part of the tile, its sums in registers
// shared   pieces of the depth, of both sides
// bytes    left once for each tile of columns, right once for each of rows, out once
// limits   heads x tiles < 2^31 blocks
template <typename T, bool kLeftTransposed, bool kRightTransposed>
__global__ void __launch_bounds__(kThreads, 4) multiply_kernel(const __grid_constant__ ProductParams p) {
  using Slot = Stage<T, kLeftTransposed, kRightTransposed>;
  auto& slots = shared_memory<Slot[kStages]>();
  const int64_t across = (p.columns + kSize - 1) / kSize, down = (p.rows + kSize - 1) / kSize;
  const auto [tile, tile_column] = divide(blockIdx.x, across);
  const auto [head, tile_row] = divide(tile, down);
  const int64_t row = tile_row * kSize, column = tile_column * kSize;

  const Source<T> left(p, p.left, head, kLeftTransposed ? p.depth : p.rows, kLeftTransposed ? p.rows : p.depth,
                       p.line_indices);
  const Source<T> right(p, p.right, head, kRightTransposed ? p.columns : p.depth,
                        kRightTransposed ? p.depth : p.columns, false);
  const auto fetch = [&](int64_t piece) {
    const int64_t depth = piece * kDepth<T>;
    if (depth < p.depth) {
      Slot& slot = slots[piece % kStages];
      kLeftTransposed ? left.fetch(slot.left, depth, row) : left.fetch(slot.left, row, depth);
      kRightTransposed ? right.fetch(slot.right, column, depth) : right.fetch(slot.right, depth, column);
    }
    commit_copies();
  };

  BlockProduct<T, kSize, kSize, kWarps> sums;
  sums.clear();
#pragma unroll 1
  for (int64_t piece = 1 - kStages; piece * kDepth<T> < p.depth; ++piece) {
    if (piece >= 0) {
      wait_copies<kStages - 2>();
      __syncthreads();
    }
    fetch(piece + kStages - 1);
    if (piece < 0) continue;
    const Slot& slot = slots[piece % kStages];
    sums.template add<kLeftTransposed ? kTransposed : kPlain, kRightTransposed ? kTransposed : kPlain>(
        slot.left, slot.right, 0, kDepth<T>);
  }
  visit(p.out, [&]<typename U>(U* out) {
    sums.for_each([&](int i, int k, auto sum) {
      if (row + i < p.rows && column + k < p.columns)
        store(out + (head * p.out_h + (row + i) * p.columns + column + k), to<U>(sum));
    });
  });
}

struct Instance {
  DType operands;
  bool left_transposed, right_transposed;
  int64_t smem_bytes;
  void (*kernel)(ProductParams);
};
template <typename T, bool kLeftTransposed, bool kRightTransposed>
constexpr Instance kInstance = {kDType<T>, kLeftTransposed, kRightTransposed,
                                kStages * sizeof(Stage<T, kLeftTransposed, kRightTransposed>),
                                multiply_kernel<T, kLeftTransposed, kRightTransposed>};

constexpr Instance kInstances[] = {
    kInstance<float, false, true>,         kInstance<float, false, false>,
    kInstance<float, true, false>,         kInstance<double, false, true>,
    kInstance<double, false, false>,       kInstance<double, true, false>,
    kInstance<__nv_bfloat16, false, true>, kInstance<__nv_bfloat16, false, false>,
    kInstance<__nv_bfloat16, true, false>, kInstance<__half, false, true>,
    kInstance<__half, false, false>,       kInstance<__half, true, false>,
};
static_assert(std::size(kInstances) == kProductKernels);

}  // namespace

void multiply(const ProductParams& p, Stream stream) {
  const Instance& instance = find_instance(kInstances, "rnn_multiply", [&](const Instance& i) {
    return i.operands == p.operands && i.left_transposed == p.left_transposed &&
           i.right_transposed == p.right_transposed;
  });
  launch({.name = "rnn_multiply",
          .grid = {p.heads * ceil_div(p.rows, kSize) * ceil_div(p.columns, kSize)},
          .threads = kThreads,
          .smem_bytes = instance.smem_bytes,
          .stream = stream},
         instance.kernel, p);
}

// [weights]
void sum(const SumParams& p, Stream stream) {
  multiply({.heads = p.heads,
            .rows = p.rows,
            .columns = p.columns,
            .depth = p.tokens,
            .operands = p.left.dtype,
            .left = {p.left.data, p.left.dtype, p.left.t, p.left.h},
            .right = {p.right.data, p.right.dtype, p.right.t, p.right.h},
            .left_transposed = true,
            .out = p.out,
            .out_h = p.out_head},
           stream);
}

}  // namespace seqkern::rnn::cuda

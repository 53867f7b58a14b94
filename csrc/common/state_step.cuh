// What the kernels of steps do with the state of a head: (K, V) in memory, blocks of it in registers.
#pragma once

#include "common/array.cuh"
#include "common/state_step.h"

namespace seqkern {

// Element of a tensor of one token.
template <typename R, typename Rows>
__device__ __forceinline__ R number(const Rows& x, int64_t b, int64_t h, int64_t i = 0) {
  return load<R>(Array{x.data, x.dtype}, b * x.b + h * x.h + i * x.i);
}

template <typename R, bool kValueMajor>
struct HeadState {
  static constexpr int kVector = 16 / sizeof(R);
  static constexpr int kKeys = kValueMajor ? kVector : kStateRows, kValues = kValueMajor ? kStateRows : kVector;
  using Block = R[kStateRows][kVector];  // kKeys x kValues, the contiguous ones as columns

  Array array;
  int64_t at;
  const int64_t &key_stride, &value_stride;  // of the kernel's parameters: read again rather than kept in registers
  int keys, size;

  static __device__ __forceinline__ R& element(Block& x, int key, int value) {
    return kValueMajor ? x[value][key] : x[key][value];
  }

  // From key k and value v on. Elements that do not exist are zero.
  __device__ __forceinline__ void load_block(Block& x, int k, int v) const {
    visit_block(k, v, [&]<typename T>(const T* data, const Rest& rest) {
#pragma unroll
      for (int r = 0; r < kStateRows; ++r) {
        Vector<T, kVector> line{};
        if (rest.vectors && r < rest.rows) {
          line = load<kVector>(data + r * rest.row_stride);
        } else {
#pragma unroll
          for (int c = 0; c < kVector; ++c) {
            if (r < rest.rows && c < rest.columns) line[c] = load(data + r * rest.row_stride + c * rest.stride);
          }
        }
#pragma unroll
        for (int c = 0; c < kVector; ++c) x[r][c] = to<R>(line[c]);
      }
    });
  }

  __device__ __forceinline__ void store_block(const Block& x, int k, int v) const {
    visit_block(k, v, [&]<typename T>(T* data, const Rest& rest) {
#pragma unroll
      for (int r = 0; r < kStateRows; ++r) {
        Vector<T, kVector> line;
#pragma unroll
        for (int c = 0; c < kVector; ++c) line[c] = to<T>(x[r][c]);
        if (rest.vectors && r < rest.rows) {
          store(data + r * rest.row_stride, line);
        } else {
#pragma unroll
          for (int c = 0; c < kVector; ++c) {
            if (r < rest.rows && c < rest.columns) store(data + r * rest.row_stride + c * rest.stride, line[c]);
          }
        }
      }
    });
  }

 private:
  // From an element on: strides, how many rows and columns there are, none if negative, and whether rows are whole
  // aligned vectors.
  struct Rest {
    int64_t row_stride, stride;
    int rows, columns;
    bool vectors;
  };

  template <typename F>
  __device__ __forceinline__ void visit_block(int k, int v, F&& f) const {
    const int64_t first = at + k * key_stride + v * value_stride;
    visit(array, [&]<typename T>(T* data) {
      Rest rest{key_stride, value_stride, keys - k, size - v, false};
      if (kValueMajor) rest = {value_stride, key_stride, size - v, keys - k, false};
      const uintptr_t bits = reinterpret_cast<uintptr_t>(data + first) | rest.row_stride * sizeof(T);
      rest.vectors = rest.stride == 1 && rest.columns >= kVector && bits % alignof(Vector<T, kVector>) == 0;
      f(data + first, rest);
    });
  }
};

// Place in shared memory of what a part adds to the sum over keys of a value, parts x width: neighbouring threads reach
// different banks, whether they are neighbours in keys or in values.
__device__ __forceinline__ int place_of_partial(int part, int value, int width) {
  return part * width + (value ^ (part & (width - 1)));
}

// Sum over the block of what its warps left, in order.
template <typename R>
__device__ __forceinline__ R sum_of_warps(const R* sums) {
  R total = sums[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarpSize; ++warp) total += sums[warp];
  return total;
}

}  // namespace seqkern

// What the kernels of the stepwise path and of a step share: an element to each thread.
#pragma once

#include "common/array.cuh"
#include "common/grid.cuh"
#include "rnn/cell.cuh"
#include "rnn/stepwise.h"

namespace seqkern::rnn::cuda {

constexpr int kThreads = 128;
constexpr int kBlocksPerSm = 8;

// The element of (B, H, size) that a thread has.
struct Element {
  int64_t b, head, i;
  bool exists;

  __device__ __forceinline__ Element(int64_t B, int64_t H, int64_t size) {
    const auto [rows, element] = divide(global_thread(), size);
    const auto [row, of_row] = divide(rows, H);
    b = row, head = of_row, i = element, exists = b < B;
  }
  // Where it lies in (H, B, size).
  __device__ __forceinline__ int64_t of_product(int64_t B, int64_t size) const { return (head * B + b) * size + i; }
};

// Element i of a tensor that has the accumulator's type.
template <typename R, typename Tensor>
__device__ __forceinline__ R* number(const Tensor& x, int64_t i) {
  return static_cast<R*>(x.data) + i;
}

// Tensors whose accumulator is R: element i, or those of all gates, `step` apart.
template <typename R, typename Tensor>
__device__ __forceinline__ R take(const Tensor& x, int64_t i) {
  R value{};
  visit(ArrayFor<R>{{x.data, x.dtype}}, [&](const auto* data) { value = to<R>(load(data + i)); });
  return value;
}
template <typename Tensor, typename R, int kGates>
__device__ __forceinline__ void take(R (&value)[kGates], const Tensor& x, int64_t i, int64_t step) {
  visit(ArrayFor<R>{{x.data, x.dtype}}, [&](const auto* data) {
#pragma unroll
    for (int g = 0; g < kGates; ++g) value[g] = to<R>(load(data + i + g * step));
  });
}
template <typename R, typename Tensor>
__device__ __forceinline__ void put(const Tensor& x, int64_t i, R value) {
  visit(ArrayFor<R>{{x.data, x.dtype}}, [&]<typename T>(T* data) { store(data + i, to<T>(value)); });
}
template <typename Tensor, typename R, int kGates>
__device__ __forceinline__ void put(const R (&value)[kGates], const Tensor& x, int64_t i, int64_t step) {
  visit(ArrayFor<R>{{x.data, x.dtype}}, [&]<typename T>(T* data) {
#pragma unroll
    for (int g = 0; g < kGates; ++g) store(data + i + g * step, to<T>(value[g]));
  });
}
// + bias (H, G, P), of any type.
template <typename R, int kGates>
__device__ __forceinline__ void add_bias(R (&u)[kGates], const Array& bias, const Element& at, int64_t units) {
  if (!bias) return;
  visit(bias, [&](const auto* data) {
#pragma unroll
    for (int g = 0; g < kGates; ++g) u[g] += to<R>(load(data + (at.head * kGates + g) * units + at.i));
  });
}

}  // namespace seqkern::rnn::cuda

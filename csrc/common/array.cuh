// Elements of an Array, whose type is known at run time.
#pragma once

#include "common/dtype.h"
#include "common/load.cuh"

namespace seqkern {

// The DType of a device type, and the type its sums are kept in.
template <typename T>
inline constexpr DType kDType = DType::kFloat32;
template <>
inline constexpr DType kDType<__nv_bfloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDType<__half> = DType::kFloat16;
template <>
inline constexpr DType kDType<double> = DType::kFloat64;

template <typename T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::Type;

// Between element types; 16-bit ones by way of float.
template <typename U, typename T>
__device__ __forceinline__ U to(T value) {
  if constexpr (sizeof(T) == 2 || sizeof(U) == 2)
    return static_cast<U>(static_cast<float>(value));
  else
    return static_cast<U>(value);
}

// visit(array, f): f(pointer to the elements in their type).
template <typename F>
__device__ __forceinline__ void visit(const Array& array, F&& f) {
  switch (array.dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(array.data));
    case DType::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(array.data));
    case DType::kFloat16:
      return f(static_cast<__half*>(array.data));
    case DType::kFloat64:
      return f(static_cast<double*>(array.data));
  }
}

// An array of data whose accumulator is R: of fp64, or of anything but that. Kernels that are in the code for each R
// then hold no code for types that they never meet.
template <typename R>
struct ArrayFor : Array {};

template <typename R, typename F>
__device__ __forceinline__ void visit(const ArrayFor<R>& array, F&& f) {
  if constexpr (kDType<R> == DType::kFloat64) {
    f(static_cast<double*>(array.data));
  } else {
    switch (array.dtype) {
      case DType::kBFloat16:
        return f(static_cast<__nv_bfloat16*>(array.data));
      case DType::kFloat16:
        return f(static_cast<__half*>(array.data));
      default:
        return f(static_cast<float*>(array.data));
    }
  }
}

template <typename U>
__device__ __forceinline__ U load(const Array& array, int64_t i) {
  U value{};
  visit(array, [&](const auto* data) { value = to<U>(load(data + i)); });
  return value;
}

template <typename U>
__device__ __forceinline__ void store(const Array& array, int64_t i, U value) {
  visit(array, [&]<typename T>(T* data) { store(data + i, to<T>(value)); });
}

}  // namespace seqkern

// Vector loads and stores: neighbouring elements of a type as one memory access of up to 16 bytes.
// Every access to global memory goes through here, so that the emulator can count bytes and check alignment.
#pragma once

#include "common/device.h"

namespace seqkern {

// kCount neighbouring elements, aligned to their size (at most 16 bytes: the widest access of a thread).
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Vector {
  static constexpr int kBytes = sizeof(T) * kCount;
  static_assert(kBytes % 16 == 0 || 16 % kBytes == 0, "1, 2, 4, 8 or a multiple of 16 bytes");

  T element[kCount];

  __host__ __device__ __forceinline__ T& operator[](int i) { return element[i]; }
  __host__ __device__ __forceinline__ const T& operator[](int i) const { return element[i]; }
};

// The widest vector of T.
template <typename T>
inline constexpr int kVectorCount = 16 / sizeof(T);

template <typename U, typename T, int kCount>
__device__ __forceinline__ Vector<U, kCount> convert(const Vector<T, kCount>& v) {
  Vector<U, kCount> result;
#pragma unroll
  for (int i = 0; i < kCount; ++i) result[i] = static_cast<U>(v[i]);
  return result;
}

// load<8>(p): p[0..7], p aligned to the vector.
template <int kCount, typename T>
__device__ __forceinline__ Vector<T, kCount> load(const T* p) {
#if defined(SEQKERN_EMULATE)
  simt::check_aligned(p, alignof(Vector<T, kCount>));
  simt::count_read(p, sizeof(T) * kCount);
#endif
  return *reinterpret_cast<const Vector<T, kCount>*>(p);
}

template <typename T, int kCount>
__device__ __forceinline__ void store(T* p, const Vector<T, kCount>& v) {
#if defined(SEQKERN_EMULATE)
  simt::check_aligned(p, alignof(Vector<T, kCount>));
  simt::count_write(p, sizeof(T) * kCount);
#endif
  *reinterpret_cast<Vector<T, kCount>*>(p) = v;
}

template <typename T>
__device__ __forceinline__ T load(const T* p) {
  return load<1>(p)[0];
}

template <typename T>
__device__ __forceinline__ void store(T* p, T value) {
  store(p, Vector<T, 1>{{value}});
}

// The tail of a row: elements from `valid` on are zero and their memory is not touched; valid may be <= 0.
template <int kCount, typename T>
__device__ __forceinline__ Vector<T, kCount> load(const T* p, int valid) {
  if (valid >= kCount) return load<kCount>(p);
  Vector<T, kCount> v;
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = i < valid ? load(p + i) : static_cast<T>(0.0f);
  return v;
}

template <typename T, int kCount>
__device__ __forceinline__ void store(T* p, const Vector<T, kCount>& v, int valid) {
  if (valid >= kCount) return store(p, v);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < valid) store(p + i, v[i]);
  }
}

}  // namespace seqkern

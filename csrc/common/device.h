// What a kernel file includes: the CUDA language, and the few primitives that the language lacks.
// nvcc gets the toolkit's headers; with SEQKERN_EMULATE a host compiler gets the emulator of common/simt instead.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(SEQKERN_EMULATE)
#include "common/simt/intrinsics.h"
#include "common/simt/math.h"
#include "common/simt/types.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace seqkern {

inline constexpr int kWarpSize = 32;

#if defined(SEQKERN_EMULATE)

template <typename S>
S& shared_memory(simt::Site where = simt::Site::current()) {
  return *static_cast<S*>(simt::shared_memory(sizeof(S), where));
}

template <typename T>
T load_acquire(const T* address) {
  simt::count_read(address, sizeof(T));
  T value;
  __atomic_load(address, &value, __ATOMIC_ACQUIRE);
  simt::after_acquire();
  return value;
}

template <typename T>
void store_release(T* address, T value) {
  simt::count_write(address, sizeof(T));
  __atomic_store(address, &value, __ATOMIC_RELEASE);
}

template <typename Predicate>
void spin_until(Predicate predicate) {
  for (bool first = true; !predicate(); first = false) simt::let_others_run(first);
}

#else

// The dynamic shared memory of the block as one struct. Its size is what the launch names in smem_bytes.
template <typename S>
__device__ __forceinline__ S& shared_memory() {
  extern __shared__ __align__(128) unsigned char seqkern_shared_memory[];
  return *reinterpret_cast<S*>(seqkern_shared_memory);
}

// Reads a flag that another block wrote with store_release: what that block wrote before is visible afterwards.
template <typename T>
__device__ __forceinline__ T load_acquire(const T* address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "flags are 4 or 8 bytes");
  T value;
  if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(bits) : "l"(address) : "memory");
    memcpy(&value, &bits, 4);
  } else {
    uint64_t bits;
    asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(bits) : "l"(address) : "memory");
    memcpy(&value, &bits, 8);
  }
  return value;
}

template <typename T>
__device__ __forceinline__ void store_release(T* address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "flags are 4 or 8 bytes");
  if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(address), "r"(bits) : "memory");
  } else {
    uint64_t bits;
    memcpy(&bits, &value, 8);
    asm volatile("st.release.gpu.u64 [%0], %1;" ::"l"(address), "l"(bits) : "memory");
  }
}

// Waits for another block. A bare loop would hang the emulator, where blocks take turns.
template <typename Predicate>
__device__ __forceinline__ void spin_until(Predicate predicate) {
  while (!predicate()) {
  }
}

#endif

}  // namespace seqkern

// cp.async: copies from global to shared memory that go on while the thread computes.
//
//   copy_async<16>(to, from);   any number of them
//   commit_copies();            closes a group
//   wait_copies<1>();           all groups but the last one have arrived, for this thread: __syncthreads() for the
//   block
#pragma once

#include "common/device.h"

#if defined(SEQKERN_EMULATE)
#include "common/simt/async.h"
#else

namespace seqkern {

// kBytes (4, 8 or 16), both addresses aligned to it. Only the first `valid` bytes are read, the others become zero.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global), "n"(kBytes), "r"(valid)
                 : "memory");
  }
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPendingGroups>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPendingGroups) : "memory");
}

}  // namespace seqkern

#endif

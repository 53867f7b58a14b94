// Values that the compiler must not reason about.
#pragma once

#include "common/device.h"

namespace seqkern {

// Leaves the register as it is. To the compiler it is a new value: what is computed from it in a loop is not kept from
// one round to the next, where registers are dearer than instructions.
__device__ __forceinline__ void make_opaque([[maybe_unused]] uint32_t& value) {
#if !defined(SEQKERN_EMULATE)
  asm volatile("" : "+r"(value));
#endif
}

}  // namespace seqkern

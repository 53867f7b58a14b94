// Values that the compiler must not reason about.
#pragma once

#include "common/device.h"

namespace seqkern {

// Leaves the register as it is. To the compiler it is a new value: what is computed from it in a loop is not kept from
// one round to the next, where registers are dearer than instructions.
template <typename Integer>
__device__ __forceinline__ void make_opaque([[maybe_unused]] Integer& value) {
  static_assert(sizeof(Integer) == 4 || sizeof(Integer) == 8, "one register or two");
#if !defined(SEQKERN_EMULATE)
  if constexpr (sizeof(Integer) == 4)
    asm volatile("" : "+r"(value));
  else
    asm volatile("" : "+l"(value));
#endif
}

}  // namespace seqkern

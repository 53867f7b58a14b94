// What the current device allows.
#pragma once

#include "common/device.h"
#include "common/limits.h"
#if defined(SEQKERN_EMULATE)
#include "common/simt/runtime.h"
#endif

namespace seqkern {

#if defined(SEQKERN_EMULATE)

inline Limits limits_of_device() {
  return {simt::kMaxSharedBytes, kH200.multiprocessors};
}

#else

// What the driver does not tell is 0.
inline Limits limits_of_device() {
  const auto ask = [](cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    const bool told =
        cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
    return int64_t{told ? value : 0};
  };
  return {ask(cudaDevAttrMaxSharedMemoryPerBlockOptin), ask(cudaDevAttrMultiProcessorCount)};
}

#endif

}  // namespace seqkern

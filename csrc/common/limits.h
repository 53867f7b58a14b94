// What plans ask of a GPU. Torch-free and CUDA-free: plans are made and printed on machines without one.
#pragma once
#include <cstdint>

namespace seqkern {

struct Limits {
  int64_t shared_bytes;     // of a block
  int64_t multiprocessors;  // of the device
};

constexpr Limits kH200 = {227 << 10, 132};

}  // namespace seqkern

// The stream that a launch goes to, for headers that know neither torch nor CUDA.
#pragma once

namespace seqkern {

struct Stream {
  void* handle = nullptr;  // a cudaStream_t; null is the default stream
};

}  // namespace seqkern

// Where a tensor with a value for every token lies. Torch-free.
#pragma once
#include "common/dtype.h"

namespace seqkern {

// Of a (B, D, L) tensor, in elements. One of d and l is 1: channels or time are contiguous; both orders are native.
struct Strides {
  int64_t b, d, l;
};

// A (B, D, L) tensor with an element type and a memory order of its own.
struct Data {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Strides stride = {};

  constexpr explicit operator bool() const { return data != nullptr; }
  constexpr bool time_contiguous() const { return stride.l == 1; }
};

}  // namespace seqkern

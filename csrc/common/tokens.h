// Tensors of tokens and heads, as kernels see them.
#pragma once
#include "common/dtype.h"

namespace seqkern {

// A (B, L, heads) or (B, L, heads, size) tensor; the last dimension of the second is contiguous. Strides are 0 where a
// tensor is constant.
struct TokenData {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t b = 0, l = 0, h = 0;  // strides

  constexpr explicit operator bool() const { return data != nullptr; }
};

}  // namespace seqkern

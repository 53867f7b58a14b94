// Tensors of tokens and heads in the torch-free programs.
#pragma once

#include "buffer.h"
#include "common/tokens.h"

namespace seqkern::naive {

// A (B, L, heads, width) tensor, in one of two memory orders.
struct Tokens : Buffer {
  TokenData data;
  int64_t heads, width;

  template <typename Case>  // has B and L
  Tokens(DType dtype, const Case& c, int64_t heads_in, int64_t width_in, bool heads_first = false)
      : Buffer(dtype, c.B * c.L * heads_in * width_in), heads(heads_in), width(width_in) {
    data = {array.data, dtype, c.L * heads * width, heads * width, width};
    if (heads_first) data.l = width, data.h = c.L * width;
  }
  int64_t place(int64_t b, int64_t t, int64_t h, int64_t i = 0) const {
    return b * data.b + t * data.l + h * data.h + i;
  }
  double at(int64_t b, int64_t t, int64_t h, int64_t i = 0) const { return (*this)[place(b, t, h, i)]; }
};

}  // namespace seqkern::naive

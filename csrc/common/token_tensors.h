// From torch tensors (B, L, heads) and (B, L, heads, size) to TokenData.
#pragma once
#include "common/tensor.h"
#include "common/tokens.h"

namespace seqkern {

// One row per token and head; t becomes a copy where its last dimension is not contiguous.
inline TokenData token_rows(const Checker& check, const char* name, Tensor& t) {
  if (t.size(3) != 1 && t.stride(3) != 1) t = as_contiguous(t);
  return {t.data_ptr(), check.floating(name, t), t.stride(0), t.stride(1), t.stride(2)};
}

// One number per token and head.
inline TokenData token_numbers(const Checker& check, const char* name, const Tensor& t) {
  return {t.data_ptr(), check.floating(name, t), t.stride(0), t.stride(1), t.stride(2)};
}

inline void check_value_heads(const Checker& check, const char* v_name, const char* q_name, const char* heads_name,
                              int64_t heads, const char* value_heads_name, int64_t value_heads) {
  if (heads == 0 ? value_heads != 0 : value_heads % heads != 0)
    check.fail(v_name, " must have a number of heads that is a multiple of the heads of ", q_name, ", ", heads_name,
               "=", heads, ", got ", value_heads_name, "=", value_heads);
}

}  // namespace seqkern

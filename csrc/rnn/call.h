// Checks that the operators of rnn share, and tensors with a row for every token, for op*.cpp.
#pragma once
#include "common/tensor.h"
#include "common/token_tensors.h"
#include "rnn/params.h"

namespace seqkern::rnn {

using MaybeTensor = std::optional<Tensor>;

inline Cell cell_of(const Checker& check, int64_t cell) {
  if (cell < 0 || cell >= kCells) check.fail("cell must be 0 to ", kCells - 1, ", got ", cell);
  return static_cast<Cell>(cell);
}

// x is (B, L, H, G, P), or (B, H, G, P) in a step. It becomes a copy where its units are not contiguous.
inline GateData gates_of(const Checker& check, Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (x.size(last) != 1 && x.stride(last) != 1) x = as_contiguous(x);
  const int64_t l = last == 4 ? x.stride(1) : 0;
  return {x.data_ptr(), check.floating("x", x), x.stride(0), l, x.stride(last - 2), x.stride(last - 1)};
}

// R (H, G, P, Q), bias (H, G, P) and proj (H, Q, P), checked against x; copies where they are not contiguous.
struct Weights {
  Tensor R;
  MaybeTensor bias, proj;
  int64_t outputs = 0;  // Q

  Weights(const Checker& check, Cell cell, const Tensor& x, const Tensor& R_in, const MaybeTensor& bias_in,
          const MaybeTensor& proj_in) {
    const CellSizes sizes = sizes_of(cell);
    const int64_t H = x.size(x.dim() - 3), P = x.size(x.dim() - 1);
    check.shape("R", R_in, {{"H", H}, {"G", sizes.gates}, {"P", P}, {"Q", proj_in ? int64_t{-1} : P}});
    outputs = R_in.size(3);
    const auto take = [&](const char* name, const Tensor& t) {
      check.floating(name, t);
      check.device(name, t, "x", x);
      return as_contiguous(t);
    };
    R = take("R", R_in);
    if (bias_in) {
      check.shape("bias", *bias_in, {{"H", H}, {"G", sizes.gates}, {"P", P}});
      bias = take("bias", *bias_in);
    }
    if (proj_in) {
      if (sizes.reads_h)
        check.fail("proj must be None for cell '", sizes.name, "', which mixes h_{t-1} with its units");
      check.shape("proj", *proj_in, {{"H", H}, {"Q", outputs}, {"P", P}});
      proj = take("proj", *proj_in);
    }
  }
};

// Whether x (B, L, ...) lies in memory with time before batch: whatever is made for its tokens then does so too.
inline bool time_major(const Tensor& x) {
  return x.size(0) > 1 && x.size(1) > 1 && x.stride(0) < x.stride(1);
}

// (B, L, shape...) in the memory order of x.
inline Tensor empty_tokens(const Tensor& x, std::initializer_list<int64_t> shape, ScalarType type) {
  const bool swapped = time_major(x);
  std::vector<int64_t> sizes = {x.size(swapped ? 1 : 0), x.size(swapped ? 0 : 1)};
  sizes.insert(sizes.end(), shape);
  const Tensor tokens = torch::stable::new_empty(x, sizes, type);
  return swapped ? torch::stable::transpose(tokens, 0, 1) : tokens;
}

// Such a tensor, or several of them as (B L, shape...): the tokens in the order of memory.
inline Tensor rows_of_tokens(const Tensor& tokens, std::initializer_list<int64_t> shape) {
  std::vector<int64_t> sizes = {tokens.size(0) * tokens.size(1)};
  sizes.insert(sizes.end(), shape);
  return torch::stable::view(time_major(tokens) ? torch::stable::transpose(tokens, 0, 1) : tokens, sizes);
}

}  // namespace seqkern::rnn

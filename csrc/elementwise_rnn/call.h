// Checks that elementwise_rnn and its step share, for op.cpp and op_step.cpp.
#pragma once
#include "common/tensor.h"
#include "elementwise_rnn/params.h"

namespace seqkern::elementwise_rnn {

using MaybeTensor = std::optional<Tensor>;

inline Cell cell_of(const Checker& check, int64_t cell) {
  if (cell < 0 || cell >= kCells) check.fail("cell must be 0 to ", kCells - 1, ", got ", cell);
  return static_cast<Cell>(cell);
}

// x is (B, L, G, D), or (B, G, D) in a step. It becomes a copy where its channels are not contiguous.
inline GateData gates_of(const Checker& check, Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (x.size(last) != 1 && x.stride(last) != 1) x = as_contiguous(x);
  const int64_t l = last == 3 ? x.stride(1) : 0;
  return {x.data_ptr(), check.floating("x", x), x.stride(0), l, x.stride(last - 1)};
}

// It becomes a copy where it is not contiguous.
inline Array weights_of(const Checker& check, Tensor& weights, Cell cell, const char* x_name, const Tensor& x) {
  check.shape("weights", weights, {{"W", sizes_of(cell).weights}, {"D", x.size(x.dim() - 1)}});
  check.device("weights", weights, x_name, x);
  weights = as_contiguous(weights);
  return {weights.data_ptr(), check.floating("weights", weights)};
}

}  // namespace seqkern::elementwise_rnn

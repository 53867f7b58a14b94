// The stepwise path of a CUDA device: for heads that no block can hold. Every token takes a product of matrices and a
// kernel that does all the rest; with proj two of each. Nothing here waits for the device.
//
//   begin(p, work)                                     begin(p, work)
//   for tau = 0 ... L - 1                              for tau = L - 1 ... 0
//     [recur]  work.product = operand R^T                [proj]    return_step(p, work, tau), work.dm = dh proj
//     [cell]   forward_step(p, work, tau)                [adjoint] backward_step(p, work, tau)
//     [proj]   work.projected = m proj^T,                [return]  work.returned = du R
//              project_step(p, work, tau)              return_step(p, work, -1)
//
// for every head; lines of [proj] are there with proj alone. tau is processing time (common/sequences.cuh). The
// products are torch's, or those below, whose sums have a fixed order. A batch has B rows; a pack is one, whose state
// is replaced where a sequence begins.
#pragma once
#include "common/sizes.h"
#include "rnn/params.h"

namespace seqkern::rnn::cuda {

// What the launches hand one another; contiguous. "Any dtype" is that of x or the accumulator's.
struct FwdWork {
  Array operand = {};    // (H, B, Q), dtype of x: h_{t-1}, as the product reads it
  Array product = {};    // (H, B, G P), any dtype
  Array m = {};          // (H, B, P), dtype of x, with proj
  Array projected = {};  // (H, B, Q), any dtype, with proj
};
struct BwdWork {
  Array du = {};        // (H, B, G P), dtype of x
  Array returned = {};  // (H, B, Q), any dtype
  Array dh = {};        // (H, B, Q), dtype of x, with proj
  Array dm = {};        // (H, B, P), any dtype, with proj
};

// Of p.workspace: what is carried from token to token, h (B, H, Q) and c (C, B, H, P), or what of their gradients is.
constexpr int64_t stepwise_workspace_bytes(const Inputs& in) {
  const int64_t of_row = in.heads * (in.outputs + in.sizes().carried * in.units);
  return in.sequences.batch * of_row * size_of(in.accumulator);
}

// Kernels for elman_tanh are those for elman_relu too.
constexpr int kCellKernels = kCells - 1;
constexpr int kernel_of(Cell cell) {
  return static_cast<int>(cell == Cell::kElmanRelu ? Cell::kElmanTanh : cell);
}
constexpr int kStepwiseKernels = 2 * (3 + 2 * kCellKernels) + 1;  // fp32 and fp64

// The first operand, and final states of sequences without tokens.
void begin(const FwdParams& p, const FwdWork& work, Stream stream);
// u, c and h of a token, and the operand of the next; with proj m instead of h and the operand, which project_step
// makes.
void forward_step(const FwdParams& p, const FwdWork& work, int64_t tau, Stream stream);
void project_step(const FwdParams& p, const FwdWork& work, int64_t tau, Stream stream);

// Gradients of initial states of sequences without tokens.
void begin(const BwdParams& p, const BwdWork& work, Stream stream);
// The gradient of h_tau, from what the next token returned; tau = -1: of the initial state alone.
void return_step(const BwdParams& p, const BwdWork& work, int64_t tau, Stream stream);
// dx and du of a token; without proj the work of return_step(tau) as well.
void backward_step(const BwdParams& p, const BwdWork& work, int64_t tau, Stream stream);

// A product for every head, out[h] (rows, columns) = left[h] right[h], by the arithmetic of `operands`
// (common/matmul.cuh). A sum is taken in the order of the depth, whatever the other sizes are.
struct ProductParams {
  struct Side {
    const void* data;
    DType dtype;
    int64_t line, h;      // strides
    int64_t element = 1;  // from one element of a line to the next
  };
  int64_t heads, rows, columns, depth;
  DType operands;
  Side left, right;
  bool left_transposed = false;   // left[h] is (depth, rows), else (rows, depth)
  bool right_transposed = false;  // right[h] is (columns, depth), else (depth, columns)
  Array out;
  int64_t out_h = rows * columns;  // from one head to the next
  // (rows,): which lines of left are its rows, where they are not the first ones in order; those outside [0, lines) are
  // zero.
  const void* line_indices = nullptr;
  bool line_indices_is_int64 = false;
  int64_t lines = 0;
};
constexpr int kProductKernels = 4 * 3;  // data types, and the ways that sides lie

void multiply(const ProductParams& p, Stream stream);
// Of params.h: the weights' gradients.
void sum(const SumParams& p, Stream stream);

// The products of the path.
constexpr ProductParams product_of(const Inputs& in, int64_t columns, int64_t depth, const Array& left,
                                   const Array& right, bool right_transposed, const Array& out) {
  const int64_t B = in.sequences.batch;
  return {.heads = in.heads,
          .rows = B,
          .columns = columns,
          .depth = depth,
          .operands = left.dtype,
          .left = {left.data, left.dtype, depth, B * depth},
          .right = {right.data, right.dtype, right_transposed ? depth : columns, depth * columns},
          .right_transposed = right_transposed,
          .out = out};
}
constexpr ProductParams recur_product(const FwdParams& p, const FwdWork& work) {
  return product_of(p, p.sizes().gates * p.units, p.outputs, work.operand, p.R, true, work.product);
}
constexpr ProductParams project_product(const FwdParams& p, const FwdWork& work) {
  return product_of(p, p.outputs, p.units, work.m, p.proj, true, work.projected);
}
constexpr ProductParams unproject_product(const BwdParams& p, const BwdWork& work) {
  return product_of(p, p.units, p.outputs, work.dh, p.proj, false, work.dm);
}
constexpr ProductParams return_product(const BwdParams& p, const BwdWork& work) {
  return product_of(p, p.outputs, p.sizes().gates * p.units, work.du, p.R, false, work.returned);
}

// rnn_step. The sums in the order of multiply().
constexpr int kStepKernels = 2 * (kCellKernels + 1);
int64_t step_workspace_bytes(const StepParams& p);
void step(const StepParams& p, Stream stream);

}  // namespace seqkern::rnn::cuda

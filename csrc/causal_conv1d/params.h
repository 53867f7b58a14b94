// What the kernels of causal_conv1d are told. Torch-free; strides are in elements; nullptr means absent.
//
//   [conv]   pre_t = bias + sum_j weight_j x_{t - (W - 1 - j) dilation}      y_t = pre_t or silu(pre_t)
//   [state]  x_{-S} .. x_{-1} is the initial state, x_{L-S} .. x_{L-1} the final state; S = (W - 1) dilation
//
// With `reverse` time runs from L - 1 to 0: the same sum over x_{t + (W - 1 - j) dilation}. States are in the order in
// which time passes: column S - 1 of the initial state is the token just before L - 1, that of the final state is x_0.
#pragma once
#include "common/layout.h"
#include "common/sequences.h"
#include "common/stream.h"

namespace seqkern::causal_conv1d {

constexpr int64_t kMaxWidth = 64;

struct Inputs {
  Sequences sequences;  // B, L, packing, direction
  int64_t channels;     // D
  int64_t width;        // W, 1 to kMaxWidth
  int64_t dilation;     // >= 1
  bool silu;
  DType dtype;    // of x, y and their gradients
  const void* x;  // (B, D, L)
  Strides x_stride;
  Array weight;         // (D, W)
  Array bias;           // (D,)
  Array initial_state;  // (N, D, S)
  const Run* runs;      // (num_runs,) the sequences as seen by the host: CPU kernels only
  int64_t num_runs;

  constexpr int64_t state_size() const { return (width - 1) * dilation; }  // S
};

struct FwdParams : Inputs {
  void* y = nullptr;  // (B, D, L), in the memory order of x
  Strides y_stride = {};
  Array final_state = {};  // (N, D, S), accumulator dtype
};

struct BwdParams : Inputs {
  const void* dy = nullptr;  // (B, D, L), in the memory order of x
  Strides dy_stride = {};
  Array dfinal_state = {};  // (N, D, S), accumulator dtype
  void* dx = nullptr;       // (B, D, L), in the memory order of x
  Strides dx_stride = {};
  Array dweight = {};         // (D, W)
  Array dbias = {};           // (D,)
  Array dinitial_state = {};  // (N, D, S)
  void* workspace = nullptr;  // workspace_bytes(), see tile.h
};

struct StepParams {
  int64_t batch;     // B
  int64_t channels;  // D
  int64_t tokens;    // T, new tokens per row
  int64_t width, dilation;
  int64_t rows;        // R, rows of conv_state
  int64_t state_size;  // columns of conv_state, >= S; the newest S are used
  bool silu;
  DType dtype;    // of x and y
  const void* x;  // (B, D, T)
  Strides x_stride;
  Array weight;      // (D, W)
  Array bias;        // (D,)
  Array conv_state;  // (R, D, state_size), updated in place
  Strides conv_state_stride;
  const void* state_indices;  // (B,) row of conv_state of each batch row; outside [0, R): skipped, y = 0
  bool state_indices_is_int64;
  void* y;  // (B, D, T)
  Strides y_stride;
};

// CPU kernels: one table per instruction set (cpu.cpp is compiled once for each).
struct CpuKernels {
  void (*fwd)(const FwdParams&);
  void (*bwd)(const BwdParams&);
  void (*step)(const StepParams&);
};
namespace generic {
extern const CpuKernels kernels;
}
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}

namespace cuda {
void fwd(const FwdParams&, Stream);
void bwd(const BwdParams&, Stream);
void step(const StepParams&, Stream);
}  // namespace cuda

}  // namespace seqkern::causal_conv1d

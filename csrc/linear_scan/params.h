// What the kernels of linear_scan are told. Torch-free; strides are in numbers; nullptr means absent.
//
//   [decay]  a_t as given, or exp of what is given with `log_space`
//   [state]  h_t = a_t h_{t-1} + b_t
//
// elementwise over batch rows b and channels d. With `complex` every number is a pair (real, imaginary) of adjacent
// elements: a trailing dimension of 2. With `reverse` time runs from L - 1 to 0. A token whose `reset` is true starts
// from the zero state: what came before, inf and NaN included, does not reach it.
#pragma once
#include "common/layout.h"
#include "common/sequences.h"
#include "common/stream.h"

namespace seqkern::linear_scan {

struct Inputs {
  Sequences sequences;  // B, L, packing, direction
  int64_t channels;     // D
  bool complex, log_space;
  DType accumulator;  // of states: fp32, or fp64 for fp64 b
  Data a;             // (B, L, D), stride 0 along dimensions where it is constant; channels are contiguous or constant
  Array initial_state;  // (sequences.count, D)
  const bool* reset;    // (B, L), contiguous; CUDA kernels only
  bool split_time;      // a plan may cut sequences into segments that run side by side
  const Run* runs;      // (num_runs,) sequences as seen by the host, cut at resets: CPU kernels only
  int64_t num_runs;

  constexpr int64_t parts() const { return complex ? 2 : 1; }  // elements of a number
};

struct FwdParams : Inputs {
  Data b = {};             // (B, L, D), contiguous channels
  Data h = {};             // (B, L, D), contiguous, dtype of b
  Array final_state = {};  // (sequences.count, D), accumulator dtype
  void* workspace = nullptr;
};

// The adjoint, time reversed: with c_t = conj(a_t) g_t the gradient of h_{t-1},
//   [dstate]  g_t = dh_t + c_{t+1}        (+ dfinal_state at the last token);  db_t = g_t;  dinitial_state = c_1
//   [da]      da_t = conj(h_{t-1}) g_t    (log_space: times conj(a_t)),  summed over the dimensions where a is constant
struct BwdParams : Inputs {
  Data dh = {};               // (B, L, D), contiguous channels
  Data h = {};                // (B, L, D), contiguous: what the forward returned; absent: da is not wanted
  Array dfinal_state = {};    // (sequences.count, D), accumulator dtype
  Data db = {};               // (B, L, D), contiguous, dtype of dh
  Data da = {};               // stride 0 along dimensions of size 1, over which it is summed; else contiguous
  Array dinitial_state = {};  // (sequences.count, D), zero where no sequence reads it
  void* workspace = nullptr;
};

// One token.
struct StepParams {
  struct Rows {  // (B, D); a constant dimension has stride 0
    void* data = nullptr;
    DType dtype = DType::kFloat32;
    int64_t b = 0, d = 0;  // strides
  };
  int64_t batch;     // B
  int64_t channels;  // D
  int64_t rows;      // R, rows of the state pool
  bool complex, log_space;
  DType accumulator;
  Rows state;  // (R, D), updated in place
  Rows a, b, h;
  const void* state_indices = nullptr;  // (B,) row of state of each batch row; outside [0, R): skipped, h = 0
  bool state_indices_is_int64 = false;
};

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
void fwd(const FwdParams& p, Stream stream);
void bwd(const BwdParams& p, Stream stream);
void step(const StepParams& p, Stream stream);
}  // namespace cuda

}  // namespace seqkern::linear_scan

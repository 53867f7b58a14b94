// What the kernels of selective_scan are told. Torch-free; strides are in real elements; nullptr means absent.
//
//   [delta]  delta'_t = delta_t + delta_bias, through softplus if `softplus`
//   [decay]  a_t = exp(delta'_t A), or 2 exp(delta'_t A) - 1 if `two_exp`
//   [state]  h_t = a_t h_{t-1} + delta'_t u_t B_t
//   [out]    out_t = sum_n C_t h_t + D u_t   (complex: 2 Re of the sum)      y_t = out_t, or out_t silu(z_t)
//
// All per batch row b, channel d and state n; B_t and C_t may also be constant in time. With `complex`, A, B, C and the
// states are pairs (real, imaginary): a trailing dimension of 2. With `reverse` time runs from L - 1 to 0.
#pragma once
#include "common/layout.h"
#include "common/sequences.h"
#include "common/stream.h"

namespace seqkern::selective_scan {

// B or C, or their gradients. Variable: (B, G, N, L) with any strides, group g for channels g D/G ... (g+1) D/G - 1.
// Constant: (D, N), contiguous; groups is 0.
struct Projection {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t groups = 0;                  // G
  int64_t b = 0, g = 0, n = 0, l = 0;  // strides of a variable one
  int64_t im = 0;                      // complex: from a real part to its imaginary part

  constexpr bool constant() const { return groups == 0; }
};

struct Inputs {
  Sequences sequences;  // B, L, packing, direction
  int64_t channels;     // D
  int64_t states;       // N
  bool complex, softplus, two_exp;
  DType accumulator;  // of states and sums: fp32, or fp64 for fp64 u
  Data u, delta;      // (B, D, L)
  Data z;             // (B, D, L) or absent
  Array A;            // (D, N)
  Projection B, C;
  Array D;              // (D,)
  Array delta_bias;     // (D,)
  Array initial_state;  // (sequences.count, D, N)
  bool split_time;      // a plan may cut sequences into segments that run side by side
  const Run* runs;      // (num_runs,) the sequences as seen by the host: CPU kernels only
  int64_t num_runs;

  constexpr int64_t parts() const { return complex ? 2 : 1; }  // reals in an element of A, B, C and states
};

// States are kept at every kChunk-th token, counted in processing time from the start of each batch row: what the
// backward recomputes the others from. checkpoints[b][c] is the state before token c kChunk; where a sequence begins
// there it is not read.
constexpr int64_t kChunk = 32;

constexpr int64_t num_chunks(const Sequences& s) {
  return (s.length + kChunk - 1) / kChunk;
}

struct FwdParams : Inputs {
  Data y = {};                  // (B, D, L), dtype and memory order of u
  Array last_state = {};        // (sequences.count, D, N), accumulator dtype
  void* checkpoints = nullptr;  // (B, chunks, N, parts, D), accumulator dtype
  void* workspace = nullptr;
};

struct BwdParams : Inputs {
  Data dy = {};                        // (B, D, L), dtype of u
  Array dlast_state = {};              // (sequences.count, D, N), accumulator dtype
  const void* checkpoints = nullptr;   // (B, chunks, N, parts, D), accumulator dtype
  Data du = {}, ddelta = {}, dz = {};  // dtype and memory order of u, delta, z
  Array dA = {};                       // (D, N)
  Projection dB = {}, dC = {};         // contiguous
  Array dD = {};                       // (D,)
  Array ddelta_bias = {};              // (D,)
  Array dinitial_state = {};           // (sequences.count, D, N), zero where no sequence reads it
  void* workspace = nullptr;
};

// One token. Channels are (H, P): heads of P channels; (D,) is one channel per head. Tensors have any strides.
struct StepParams {
  int64_t batch;        // B
  int64_t heads, size;  // H, P
  int64_t states;       // N
  int64_t rows;         // R, rows of the state pool
  bool complex, softplus, two_exp;
  DType accumulator;
  struct PerChannel {  // (B, H, P), or (H, P) with b = 0; absent: nullptr
    void* data = nullptr;
    DType dtype = DType::kFloat32;
    int64_t b = 0, h = 0, p = 0;

    constexpr explicit operator bool() const { return data != nullptr; }
  };
  struct PerState {  // state (R, H, P, N), A (H, P, N), B and C (B, G, N); a dimension that is missing has stride 0
    void* data = nullptr;
    DType dtype = DType::kFloat32;
    int64_t b = 0, h = 0, p = 0, n = 0;  // strides; the imaginary part follows the real one
    int64_t heads_per_group = 1;  // head h reads entry h / heads_per_group along its dimension h: H / G of B and C
  };
  PerState state;  // updated in place
  PerChannel u, delta, z, D, delta_bias, y;
  PerState A, B, C;
  const void* state_indices = nullptr;  // (B,) row of state of each batch row; outside [0, R): skipped, y = 0
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

}  // namespace seqkern::selective_scan

// What the kernels of delta_rule are told. Torch-free; strides are in elements; nullptr means absent.
//
//   [norm]    q and k are divided by the root of the sum of their squares + kNormEps, where asked for
//   [decay]   S'_t = diag(exp g_t) S_{t-1}
//   [erase]   u_t = beta_t (v_t - S'_t^T e_t), e_t = k_t where no erase key is given
//   [write]   S_t = S'_t + k_t u_t^T
//   [read]    o_t = scale S_t^T q_t
//
// per batch row b and value head hv, which reads key head hv / (HV / H). With `reverse` time runs from L - 1 to 0.
#pragma once
#include "common/dtype.h"
#include "common/sequences.h"
#include "common/stream.h"
#include "common/tokens.h"

namespace seqkern::delta_rule {

using Data = TokenData;

constexpr double kNormEps = 1e-6;

enum class Decay : int32_t {
  kNone,   // g = 0
  kToken,  // g (B, L, HV)
  kKey,    // g (B, L, HV, K)
};

struct Inputs {
  Sequences sequences;                     // B, L, packing by cu_seqlens, direction
  int64_t heads, value_heads, keys, size;  // H, HV, K, V
  DType accumulator;                       // of states and sums: fp32, or fp64 for fp64 data
  Data q, k;                               // (B, L, H, K)
  Data erase;                              // e: (B, L, H, K), or absent; it is never normalized. Dtype of q, k and v
  Data v;                                  // (B, L, HV, V)
  Data beta;                               // (B, L, HV)
  Decay form;
  Data decay;  // (B, L, HV) or (B, L, HV, K)
  bool normalize;
  double scale;
  Array initial_state;  // (sequences.count, HV, K, V), contiguous
  bool split_time;      // a plan may cut sequences into segments that run side by side
  const Run* runs;      // (num_runs,) sequences as seen by the host: CPU kernels only
  int64_t num_runs;
};

struct FwdParams : Inputs {
  Data o = {};             // (B, L, HV, V), contiguous, dtype of v
  Data u = {};             // the same in the operands' dtype (operand_of); only where a backward may follow
  Array final_state = {};  // accumulator dtype
  void* workspace = nullptr;
};

// Gradients; README.md has the equations.
struct BwdParams : Inputs {
  Data u = {};                // what the forward gave
  Data dO = {};               // (B, L, HV, V), dtype of v
  Array dfinal_state = {};    // accumulator dtype
  Data dq = {}, dk = {};      // (B, L, H, K), contiguous, dtype of q
  Data derase = {};           // likewise, where e is given
  Data dv = {};               // (B, L, HV, V), contiguous, dtype of v
  Data dbeta = {};            // (B, L, HV), contiguous, dtype of beta
  Data ddecay = {};           // (B, L, HV) or (B, L, HV, K), contiguous, dtype of decay
  Array dinitial_state = {};  // zero where no sequence reads it
  void* workspace = nullptr;
};

// One token.
struct StepParams {
  struct Rows {  // (B, heads) or (B, heads, size)
    void* data = nullptr;
    DType dtype = DType::kFloat32;
    int64_t b = 0, h = 0, i = 0;  // strides

    constexpr explicit operator bool() const { return data != nullptr; }
  };
  int64_t batch;                           // B
  int64_t heads, value_heads, keys, size;  // H, HV, K, V
  int64_t rows;                            // R, rows of the state pool
  DType accumulator;
  Rows S;       // (R, HV, K, V), updated in place; i is the stride of keys
  int64_t S_v;  // stride of values
  Rows q, k, erase, v, beta;
  Decay form;
  Rows decay;
  bool normalize;
  double scale;
  Rows o;
  const void* state_indices = nullptr;  // (B,) row of state of each batch row; outside [0, R): skipped, o = 0
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

}  // namespace seqkern::delta_rule

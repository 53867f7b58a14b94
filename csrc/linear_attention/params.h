// What the kernels of linear_attention are told. Torch-free; strides are in elements; nullptr means absent.
//
//   [gate]   g_t, w_t: log decay and weight of token t, as the form of the gates says
//   [state]  S_t = diag(exp g_t) S_{t-1} + w_t k_t v_t^T
//   [sum]    z_t = exp(g_t) z_{t-1} + w_t k_t
//   [read]   n_t = scale S_t^T q_t, or n_t = scale (S_{t-1}^T q_t + (q_t . (bonus * k_t)) v_t)
//   [norm]   d_t = 1, or z_t . q_t + eps, or max(|scale z_t . q_t|, exp(-m_t)) + eps
//   [out]    o_t = n_t / d_t
//   [skip]   y_t = (o_t + D v_t) silu(gate_t)
//
// per batch row b and value head hv, which reads key head hv / (HV / H). With `reverse` time runs from L - 1 to 0.
// d_t reads z as n_t reads S: with read_previous, z_{t-1} . q_t + q_t . (bonus * k_t).
#pragma once
#include "common/dtype.h"
#include "common/sequences.h"
#include "common/stream.h"
#include "common/tokens.h"

namespace seqkern::linear_attention {

using Data = TokenData;

struct State {  // contiguous, of any dtypes
  Array S;      // (sequences.count, HV, K, V), or (sequences.count, HV, V, K) with value_major
  Array z;      // (sequences.count, HV, K), with a normalizer
  Array m;      // (sequences.count, HV), with Normalizer::kMax

  constexpr explicit operator bool() const { return S || z || m; }  // without values S has no memory
};

enum class Form : int32_t {
  kNone,   // g = 0, w = 1
  kToken,  // g = decay (B, L, HV), or (HV,) through strides of 0; w = 1
  kKey,    // g = decay (B, L, HV, K); w = 1
  kDelta,  // delta = decay + bias, its softplus where asked, clamped to [low, high]; g = delta A, w = delta
  kExp,    // m_t = max(f_t + m_{t-1}, input_t) with f = log sigmoid(decay); g = f_t + m_{t-1} - m_t,
           // w = exp(input_t - m_t); an empty state has m = -inf
};

struct Gates {
  Form form = Form::kNone;
  Data decay;        // log decay | delta | pre-activation of the forget gate
  Data input;        // (B, L, HV), kExp only
  Array A, bias;     // (HV,), kDelta only; bias may be absent
  bool softplus;     // of delta
  double low, high;  // limits of delta, after softplus
};

enum class Normalizer : int32_t {
  kNone,
  kSum,  // d = z . q + eps, n without scale
  kMax,  // d = max(|scale z . q|, exp(-m)) + eps; with Form::kExp only
};

struct Inputs {
  Sequences sequences;                     // B, L, packing, direction
  int64_t heads, value_heads, keys, size;  // H, HV, K, V
  DType accumulator;                       // of states and sums: fp32, or fp64 for fp64 data
  Data q, k;                               // (B, L, H, K)
  Data v;                                  // (B, L, HV, V), dtype of q and k
  Gates gates;
  Array bonus;             // (H, K), contiguous; with read_previous only
  Array skip;              // D: (HV, V) through the stride below
  int64_t skip_h, skip_v;  // strides of D; skip_v = 0: one number per head
  Data gate;               // (B, L, HV, V)
  Normalizer normalizer;
  bool read_previous;
  bool value_major;  // layout of every state of this call
  double scale, eps;
  State initial_state;
  bool split_time;  // a plan may cut sequences into segments that run side by side
  const Run* runs;  // (num_runs,) sequences as seen by the host: CPU kernels only
  int64_t num_runs;
};

struct FwdParams : Inputs {
  Data y = {};                   // (B, L, HV, V), contiguous, dtype of v
  Data o = {};                   // the same before [skip]; only with a gate and where a backward may follow
  void* denominators = nullptr;  // (B, L, HV): z . q as read, accumulator dtype; only where a backward may follow
  void* maxima = nullptr;        // (B, L, HV): m_t, accumulator dtype; likewise, with Normalizer::kMax
  State final_state = {};        // accumulator dtype
  void* workspace = nullptr;
};

// Gradients; README.md has the equations.
struct BwdParams : Inputs {
  Data dy = {};                        // (B, L, HV, V), dtype of v
  Data o = {};                         // before [skip], what the forward gave; with a gate or a normalizer
  const void* denominators = nullptr;  // (B, L, HV), with a normalizer
  const void* maxima = nullptr;        // (B, L, HV), with Normalizer::kMax
  State dfinal_state = {};             // accumulator dtype
  Data dq = {}, dk = {};               // (B, L, H, K), contiguous, dtype of q
  Data dv = {};                        // (B, L, HV, V), contiguous, dtype of v
  Data dgate = {};                     // likewise
  Data ddecay = {};           // (B, L, HV) or (B, L, HV, K), contiguous, or (HV,) with strides b = l = 0, its dtype
  Data dinput = {};           // (B, L, HV), contiguous
  Array dA = {}, dbias = {};  // (HV,)
  Array dbonus = {};          // (H, K)
  Array dskip = {};           // (HV,) if skip_v == 0, else (HV, V)
  State dinitial_state = {};  // zero where no sequence reads it
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
  struct StateRows {
    Rows rows;      // (R, HV, ...)
    int64_t v = 0;  // stride of values; rows.i is that of keys
  };
  int64_t batch;                           // B
  int64_t heads, value_heads, keys, size;  // H, HV, K, V
  int64_t rows;                            // R, rows of the state pool
  DType accumulator;
  StateRows S;       // (R, HV, K, V), updated in place
  bool value_major;  // S is given as (R, HV, V, K)
  Rows z, m;         // (R, HV, K), (R, HV), likewise
  Rows q, k, v;
  Form form;
  Rows decay, input;
  Array A, bias;  // (HV,), contiguous
  bool softplus;
  double low, high;
  Array bonus;  // (H, K), contiguous
  Array skip;
  int64_t skip_h, skip_v;
  Rows gate;
  Normalizer normalizer;
  bool read_previous;
  double scale, eps;
  Rows y;
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

}  // namespace seqkern::linear_attention

// What the kernels of softmax_scan are told. Torch-free; strides are in elements; nullptr means absent.
//
//   [max]   m_t = max(m_{t-1}, s_t)
//   [sum]   n_t = exp(m_{t-1} - m_t) n_{t-1} + exp(s_t - m_t)
//   [sumv]  w_t = exp(m_{t-1} - m_t) w_{t-1} + exp(s_t - m_t) v_t
//   [out]   o_t = w_t / n_t
//
// per batch row b and head h, w and v of V values. An empty state has m = -inf, n = 0, w = 0; while every s so far is
// -inf the state stays empty and o_t = 0. With `reverse` time runs from L - 1 to 0.
#pragma once
#include "common/dtype.h"
#include "common/sequences.h"
#include "common/stream.h"

namespace seqkern::softmax_scan {

// A (B, L, H) or (B, L, H, V) tensor; the V values are contiguous.
struct Data {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t b = 0, l = 0, h = 0;  // strides

  constexpr explicit operator bool() const { return data != nullptr; }
};

struct State {  // contiguous
  Array m, n;   // (sequences.count, H)
  Array w;      // (sequences.count, H, V)

  constexpr explicit operator bool() const { return static_cast<bool>(m); }
};

struct Inputs {
  Sequences sequences;  // B, L, packing, direction
  int64_t heads, size;  // H, V
  DType accumulator;    // of states and sums: fp32, or fp64 for fp64 v
  Data s;               // (B, L, H), a dtype of its own
  Data v;               // (B, L, H, V)
  State initial_state;  // of any dtypes; m = -inf: empty, whatever n and w
  bool split_time;      // a plan may cut sequences into segments that run side by side
  const Run* runs;      // (num_runs,) sequences as seen by the host: CPU kernels only
  int64_t num_runs;
};

struct FwdParams : Inputs {
  Data o = {};                  // (B, L, H, V), contiguous, dtype of v
  State final_state = {};       // accumulator dtype
  void* normalizers = nullptr;  // (B, L, H, 2): m_t and n_t, accumulator dtype; only where a backward may follow
  void* workspace = nullptr;
};

// With p_t = exp(s_t - m_t) / n_t and r_t = exp(m_t - m_{t+1}) n_t / n_{t+1}, both at most 1, time reversed:
//   [dout]  G_t = do_t + r_t G_{t+1}             (at the last token + n_t dw)
//   [dsum]  R_t = do_t . o_t + r_t R_{t+1}       (at the last token - n_t dn)
//   [dv]    dv_t = p_t G_t
//   [ds]    ds_t = p_t (v_t . G_t - R_t)
// Before the first token, with q = exp(m_0 - m_1) / n_1: dw_0 = q G_1, dn_0 = -q R_1, dm_0 = n_0 dn_0 + w_0 . dw_0.
// The maximum itself: e = dm - n dn - w . dw of the final state goes to where m came from: to the first token t with
// m_t = m_final, or to dm_0 if that is m_0 already.
struct BwdParams : Inputs {
  Data do_ = {};                      // (B, L, H, V), dtype of v
  Data o = {};                        // (B, L, H, V), what the forward returned
  const void* normalizers = nullptr;  // (B, L, H, 2), accumulator dtype
  State dfinal_state = {};            // accumulator dtype
  Data ds = {}, dv = {};              // contiguous, dtypes of s and v
  State dinitial_state = {};          // zero where no sequence reads it
  void* workspace = nullptr;
};

// One token.
struct StepParams {
  struct Rows {  // (B, H) or (B, H, V)
    void* data = nullptr;
    DType dtype = DType::kFloat32;
    int64_t b = 0, h = 0, v = 0;  // strides
  };
  int64_t batch;        // B
  int64_t heads, size;  // H, V
  int64_t rows;         // R, rows of the state pool
  DType accumulator;
  Rows m, n, w;  // (R, H), (R, H), (R, H, V), updated in place
  Rows s, v, o;
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

}  // namespace seqkern::softmax_scan

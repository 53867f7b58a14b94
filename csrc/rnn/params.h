// What the kernels of rnn are told. Torch-free; strides are in elements; nullptr means absent.
//
//   [recur]  u_t = R h_{t-1} + bias                   a product for each head: (G P, Q) by (Q,)
//   [cell]   m_t, c_t = cell(x_t, u_t, c_{t-1})       for every unit p by itself: cells.h; "gru" reads h_{t-1} as well
//   [proj]   h_t = proj m_t, or m_t without proj
//
// for each batch row b and head. c stands for all numbers that a unit carries beside h. With `reverse` time runs from
// L - 1 to 0. A token whose `reset` is true starts from the empty state: what came before, inf and NaN included, does
// not reach it.
//   [zoneout]  in training an element of h_t is that of h_{t-1} with a probability, else their mean with such weights
//   [dropout]  in training the product reads h_{t-1} with elements dropped, the same ones throughout a sequence; the
//              others are divided by 1 - recurrent_dropout
#pragma once
#include "common/dtype.h"
#include "common/sequences.h"
#include "common/stream.h"
#include "common/tokens.h"

namespace seqkern::rnn {

enum class Cell : int64_t { kLstm, kGru, kSlstm, kElmanTanh, kElmanRelu };
constexpr int64_t kCells = 5;

struct CellSizes {
  const char* name;
  int gates;       // G
  int carried;     // C, numbers that a unit carries beside h: lstm c; slstm y = c / n and l = m + log n
  int published;   // parts of the state of a step: slstm's are h, c, n, m
  bool reads_h;    // the cell itself reads h_{t-1}: there is no proj
  bool two_sides;  // the gradient of u is not that of x in the last gate
};
namespace {  // CPU kernels are compiled once per instruction set, which must share no code
constexpr CellSizes sizes_of(Cell cell) {
  constexpr CellSizes kSizes[kCells] = {{"lstm", 4, 1, 2, false, false},
                                        {"gru", 3, 0, 1, true, true},
                                        {"slstm", 4, 2, 4, false, false},
                                        {"elman_tanh", 1, 0, 1, false, false},
                                        {"elman_relu", 1, 0, 1, false, false}};
  return kSizes[static_cast<int64_t>(cell)];
}
}  // namespace

// (B, L, H, G, P), contiguous units.
struct GateData {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t b = 0, l = 0, h = 0, g = 0;  // strides

  constexpr explicit operator bool() const { return data != nullptr; }
};
// (C, B, L, H, P), contiguous units: the numbers c of every token.
struct CarriedData {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t c = 0, b = 0, l = 0, h = 0;  // strides

  constexpr explicit operator bool() const { return data != nullptr; }
};

// Positions of random numbers (common/random.h): four neighbours q of (H, Q) share a call, q / 4 is `second`.
//   [zoneout]  first = b L + l of the token in memory, third = 0
//   [dropout]  first = the sequence, third = 1
enum RandomKind : uint32_t { kZoneoutWords, kDropoutWords };

struct Inputs {
  Sequences sequences;  // B, L, packing (never seq_idx), direction
  int64_t heads;        // H
  int64_t units;        // P
  int64_t outputs;      // Q, of h: P without proj
  Cell cell;
  DType accumulator;  // of states and sums: fp32, or fp64 for fp64 x
  GateData x;         // (B, L, H, G, P)
  Array R;            // (H, G, P, Q), contiguous; read as elements of x's type by kernels for it
  Array bias;         // (H, G, P), contiguous
  Array proj;         // (H, Q, P), contiguous
  Array initial_h;    // (N, H, Q), contiguous
  Array initial_c;    // (C, N, H, P), contiguous
  const bool* reset;  // (B, L), contiguous; CUDA kernels only
  double zoneout;     // probabilities; 0: absent
  double recurrent_dropout;
  bool training;
  const int64_t* seed;   // one number, where random numbers are asked for
  bool batch_invariant;  // products in a fixed order
  const Run* runs;       // (num_runs,) sequences as seen by the host, cut at resets: CPU kernels only
  int64_t num_runs;

  constexpr CellSizes sizes() const { return sizes_of(cell); }
  constexpr bool projects() const { return proj || outputs != units; }  // proj without elements has no data
  constexpr bool drops() const { return training && recurrent_dropout > 0; }
  constexpr bool zones() const { return zoneout > 0; }
};

struct FwdParams : Inputs {
  TokenData h = {};    // (B, L, H, Q), dtype of x
  Array final_h = {};  // (N, H, Q), accumulator dtype
  Array final_c = {};  // (C, N, H, P), accumulator dtype
  GateData u = {};     // (B, L, H, G, P), dtype of x: [recur], where a backward may follow
  CarriedData c = {};  // (C, B, L, H, P), accumulator dtype: c_t, where a backward may follow
  void* workspace = nullptr;
};

// Time reversed. dh_t is the gradient of h_t: that of the output, and what the next token of the sequence sends:
//   [adjoint]  dm_t = proj^T dh_t, or dh_t;  dx_t, du_t, dc_{t-1} = the cell's adjoint(dm_t, dc_t)
//   [return]   dh_{t-1} gets R^T du_t ([dropout]'s mask and scale applied), what the cell and [zoneout] read of
//              h_{t-1} directly; all of it clamped to +-grad_clip, before the gradient of the output is added
// The gradients of weights are sums over tokens, by products after the kernel:
//   [weights]  dR = sum du_t operand_t^T, dbias = sum du_t, dproj = sum dh_t m_t^T
struct BwdParams : Inputs {
  double grad_clip = -1;    // < 0: none
  TokenData dh = {};        // (B, L, H, Q), dtype of x
  Array dfinal_h = {};      // (N, H, Q), accumulator dtype
  Array dfinal_c = {};      // (C, N, H, P), accumulator dtype
  TokenData h = {};         // as the forward left them
  GateData u = {};          //
  CarriedData c = {};       //
  GateData dx = {};         // (B, L, H, G, P), dtype of x
  TokenData du_last = {};   // (B, L, H, P), dtype of x: of the last gate, for cells with two sides
  TokenData operand = {};   // (B, L, H, Q), dtype of x: what R was multiplied with, if wanted
  TokenData dh_total = {};  // (B, L, H, Q), dtype of x: dh_t, with proj
  TokenData m = {};         // (B, L, H, P), dtype of x: m_t, with proj
  Array dinitial_h = {};    // (N, H, Q), accumulator dtype, zero where no sequence reads it
  Array dinitial_c = {};    // (C, N, H, P), the same
  void* workspace = nullptr;
};

// One token. [zoneout] as at inference.
struct StepParams {
  struct Rows {  // (R, H, P) or (B, H, Q); a dimension of size 1 has stride 0
    void* data = nullptr;
    DType dtype = DType::kFloat32;
    int64_t b = 0, h = 0, p = 0;  // strides
  };
  int64_t batch;                  // B
  int64_t heads, units, outputs;  // H, P, Q
  int64_t rows;                   // R, rows of the state pool
  Cell cell;
  DType accumulator;
  Rows state[4];        // as published; (R, H, Q), the others (R, H, P); updated in place
  GateData x;           // (B, H, G, P), contiguous units; l is not used
  Array R, bias, proj;  // as above
  double zoneout;
  Rows h;                               // (B, H, Q), dtype of x
  const void* state_indices = nullptr;  // (B,) row of state of each batch row; outside [0, R): skipped, h = 0
  bool state_indices_is_int64 = false;
  void* workspace = nullptr;
};

// Sums over tokens in a fixed order, whatever the number of threads: out[h] (M, N) = sum_t left_t[h] right_t[h]^T.
struct SumParams {
  int64_t tokens, heads, rows, columns;  // T, H, M, N
  DType accumulator;
  struct Side {
    const void* data;
    DType dtype;
    int64_t t, h;  // strides; elements are contiguous
  };
  Side left;   // (T, H, M)
  Side right;  // (T, H, N)
  Array out;   // (H, M, N) with rows of one head `out_head` elements from those of the next
  int64_t out_head;
};

struct CpuKernels {
  void (*fwd)(const FwdParams&);
  void (*bwd)(const BwdParams&);
  void (*step)(const StepParams&);
  void (*sum)(const SumParams&);
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

}  // namespace seqkern::rnn

// What the kernels of elementwise_rnn are told. Torch-free; strides are in elements; nullptr means absent.
//
//   [cell]  s_t = cell(x_t, s_{t-1}),  h_t = the first number of s_t
//
// for every batch row b and channel d by itself: the state s is one to three numbers of a channel, x_t the
// pre-activations of its gates, and the recurrent weights are numbers of the channel as well. The cells are in cells.h.
// With `reverse` time runs from L - 1 to 0. A token whose `reset` is true starts from the empty state: what came
// before, inf and NaN included, does not reach it.
#pragma once
#include "common/layout.h"
#include "common/sequences.h"
#include "common/stream.h"

namespace seqkern::elementwise_rnn {

enum class Cell : int64_t { kGru, kLstm, kSlstm, kIndRnn, kElman };
constexpr int64_t kCells = 5;

struct CellSizes {
  const char* name;
  int gates, weights;  // G, W
  int states;          // S, numbers that kernels carry
  int published;       // parts of the state of a step: sLSTM's are h, c, n, m
};
namespace {  // CPU kernels are compiled once per instruction set, which must share no code
constexpr CellSizes sizes_of(Cell cell) {
  constexpr CellSizes kSizes[kCells] = {
      {"gru", 3, 3, 1, 1}, {"lstm", 3, 5, 2, 2}, {"slstm", 4, 4, 3, 4}, {"indrnn", 1, 1, 1, 1}, {"elman", 1, 1, 1, 1}};
  return kSizes[static_cast<int64_t>(cell)];
}
}  // namespace

// How the forward is solved; see README.md.
//   serial    token by token
//   newton    unknowns at every token of a tile, solved by affine scans
//   shooting  unknowns at the boundaries of chunks
//   automatic the plan of the device chooses
enum class Solver : int64_t { kAutomatic, kSerial, kNewton, kShooting };
constexpr int64_t kSolvers = 4;

// The backward needs the states again. The forward keeps one of every kKept tokens and the backward computes those
// between. Pieces are counted from the last token in processing time, as the backward meets them: checkpoint j is the
// state before the first token of piece j, tokens max(0, L - kKept (j + 1)) ... L - kKept j - 1 in processing time;
// before the first token of a row it is the empty state, and is not read where a sequence or a reset begins the piece.
constexpr int kKept = 16;

// (B, L, G, D), contiguous channels.
struct GateData {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t b = 0, l = 0, g = 0;  // strides
};

struct Inputs {
  Sequences sequences;  // B, L, packing (never seq_idx), direction
  int64_t channels;     // D
  Cell cell;
  DType accumulator;    // of states: fp32, or fp64 for fp64 x
  GateData x;           // (B, L, G, D)
  Array weights;        // (W, D), contiguous
  Array initial_state;  // (S, sequences.count, D), contiguous
  const bool* reset;    // (B, L), contiguous; CUDA kernels only
  bool split_time;      // a plan may cut sequences into chunks that run side by side
  const Run* runs;      // (num_runs,) sequences as seen by the host, cut at resets: CPU kernels only
  int64_t num_runs;

  constexpr CellSizes sizes() const { return sizes_of(cell); }
};

// Per channel of a row, where the caller asks for it; nullptr otherwise.
struct Stats {
  int32_t* sweeps = nullptr;  // (B, D) passes over the tokens that the solver took before it accepted; serial: 0
  float* estimate = nullptr;  // (B, D) of the error of the states, as the solver last saw it; serial: 0
  bool* repaired = nullptr;   // (B, D) whether it was not accepted, and computed serially
};

struct FwdParams : Inputs {
  Solver solver = Solver::kSerial;  // automatic: the plan chooses
  double atol = -1;                 // < 0: tolerance_of(accumulator) times max(1, |state|)
  int64_t max_sweeps = 0;           // 0: the solver's own
  Data h = {};                      // (B, L, D), contiguous, dtype of x
  Array final_state = {};           // (S, sequences.count, D), accumulator dtype
  Array checkpoints = {};           // (S, B, ceil(L / kKept), D), accumulator dtype, where a backward may follow
  Stats stats = {};
  void* workspace = nullptr;
};

constexpr double tolerance_of(DType accumulator) {
  return accumulator == DType::kFloat64 ? 1e-11 : 1e-5;
}
constexpr double kAccepted = 0.5;  // part of the tolerance that an estimate of first order may take
// Where two sequences of states differ they are rounded differently, by this part of a state at every token.
constexpr double rounding_of(DType accumulator) {
  return accumulator == DType::kFloat64 ? 0x1p-51 : 0x1p-22;
}

// The adjoint, time reversed. Of a token, with ds_t the gradient of s_t (dh_t added to its first number):
//   [adjoint]  ds_{t-1}, dx_t, dweights += the cell's adjoint(x_t, s_{t-1}, ds_t)
struct BwdParams : Inputs {
  Data dh = {};               // (B, L, D), contiguous channels, dtype of x
  Array dfinal_state = {};    // (S, sequences.count, D), accumulator dtype
  Array checkpoints = {};     // as the forward left them
  GateData dx = {};           // (B, L, G, D), contiguous, dtype of x
  Array dweights = {};        // (W, D), dtype of the weights; absent: not wanted
  Array dinitial_state = {};  // (S, sequences.count, D), zero where no sequence reads it
  void* workspace = nullptr;
};

// One token.
struct StepParams {
  struct Rows {  // (B, D) or (R, D); a dimension of size 1 has stride 0
    void* data = nullptr;
    DType dtype = DType::kFloat32;
    int64_t b = 0, d = 0;  // strides
  };
  int64_t batch;     // B
  int64_t channels;  // D
  int64_t rows;      // R, rows of the state pool
  Cell cell;
  DType accumulator;
  Rows state[4];                        // (R, D) each, as published; updated in place
  GateData x;                           // (B, G, D), contiguous channels; l is not used
  Array weights;                        // (W, D), contiguous
  Rows h;                               // (B, D)
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

}  // namespace seqkern::elementwise_rnn

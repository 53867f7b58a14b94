// How the CPU kernels cut the work, and the memory that they need. Pure functions of the call.
#pragma once
#include "common/sizes.h"
#include "elementwise_rnn/params.h"

namespace seqkern::elementwise_rnn {
namespace {  // kernels are compiled once per instruction set, which must share no code

// Pieces of a row: see kKept.
constexpr int64_t num_pieces(const Inputs& in) {
  return ceil_div(in.sequences.length, kKept);
}

// Rows of scratch memory are whole vectors for every instruction set.
constexpr int64_t padded_channels(const Inputs& in) {
  return round_up(in.channels, 16);
}

// ---- solvers

// Chunks of shooting: enough of them to share out to threads; the longer they are, the fewer sweeps it takes.
constexpr int64_t kMostChunks = 16, kShortestChunk = 64;

// Tokens of a chunk, whole pieces.
constexpr int64_t chunk_tokens(const Inputs& in) {
  return at_least(kShortestChunk, round_up(ceil_div(in.sequences.length, kMostChunks), kKept));
}
constexpr int64_t num_chunks(const Inputs& in) {
  return ceil_div(in.sequences.length, chunk_tokens(in));
}

// The automatic solver is the serial one: a thread hides the latency of a cell by working on several vectors of
// channels at once, which leaves nothing to gain from an iteration that repeats the work.
constexpr Solver solver_of(const FwdParams& p) {
  const int64_t least = p.solver == Solver::kShooting ? 2 : 1;
  if (!p.split_time || num_chunks(p) < least) return Solver::kSerial;
  return p.solver == Solver::kAutomatic ? Solver::kSerial : p.solver;
}

// What shooting keeps of each chunk: s_p, F_p, M_p, N_p, R_p, Q_p; and of each row, besides: see cpu_shooting.h.
constexpr int64_t numbers_of_chunk(const Inputs& in) {
  const int64_t S = in.sizes().states;
  return 4 * S + 2 * S * S;
}
constexpr int64_t kNumbersOfRow = 2;

constexpr int64_t cpu_fwd_workspace_bytes(const FwdParams& p) {
  if (solver_of(p) != Solver::kShooting) return 0;
  const int64_t rows = num_chunks(p) * numbers_of_chunk(p) + kNumbersOfRow;
  return p.sequences.batch * rows * padded_channels(p) * size_of(p.accumulator);
}

// ---- backward

// dweights are summed over slabs of runs, and then over the slabs in order.
constexpr int64_t kMaxSlabs = 32;

constexpr int64_t num_slabs(const Inputs& in) {
  return at_most(in.num_runs, kMaxSlabs);
}

// (slabs, W, D)
constexpr int64_t cpu_bwd_workspace_bytes(const BwdParams& p) {
  return p.dweights ? num_slabs(p) * p.sizes().weights * p.channels * size_of(p.accumulator) : 0;
}

}  // namespace
}  // namespace seqkern::elementwise_rnn

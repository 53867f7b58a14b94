// Pure functions of shape: how the forward is cut on a GPU and what it needs. Callable without a GPU; the launches use
// the same plans that are printed.
#pragma once
#include <initializer_list>

#include "common/time_tile.h"
#include "elementwise_rnn/params.h"

namespace seqkern::elementwise_rnn::cuda {

using time_scan::ceil_div, time_scan::may_be_empty;

// What the kernels of one cell hold of a token and of a state, in numbers of the accumulator's size.
struct Shape {
  int gates, states, size;
};
constexpr Shape shape_of(Cell cell, DType accumulator) {
  return {sizes_of(cell).gates, sizes_of(cell).states, static_cast<int>(size_of(accumulator))};
}

// Tokens of a chunk of the kernels that walk through time: 64 or 96 bytes of registers for the gates on their way.
constexpr int walk_tokens(const Shape& of) {
  return (of.gates == 1 ? 64 : of.gates == 3 ? 32 : 16) / of.size;
}
// Of a chunk of newton, of which a tile has kTileWarps: as many as fit.
constexpr int newton_tokens(const Shape& of) {
  return of.states == 1 ? 64 / of.size : of.states == 2 ? 32 / of.size : 16 / of.size;
}

// Shared memory. Of a walk: the gates of a chunk for each warp. Of newton: of each token gates, state and a matrix; of
// each warp change, error and state at the end of its chunk, an estimate, and votes.
constexpr int64_t kLanes = time_scan::kChannels;
constexpr int64_t walk_smem_bytes(const Shape& of) {
  return time_scan::kSerialWarps * kLanes * walk_tokens(of) * of.gates * of.size;
}
constexpr int64_t newton_smem_bytes(const Shape& of) {
  const int token = of.gates + of.states + of.states * of.states, warp = 3 * of.states + 1;
  return time_scan::kTileWarps * (kLanes * of.size * (newton_tokens(of) * token + warp) + 4);
}

constexpr int64_t kMaxSharedBytes = 99 << 10;  // of a block on every architecture from sm_80 on
constexpr bool tiles_fit() {
  for (int64_t cell = 0; cell < kCells; ++cell) {
    for (const int size : {4, 8}) {
      const Shape of = shape_of(static_cast<Cell>(cell), size == 4 ? DType::kFloat32 : DType::kFloat64);
      if (walk_smem_bytes(of) > kMaxSharedBytes || newton_smem_bytes(of) > kMaxSharedBytes) return false;
    }
  }
  return true;
}
static_assert(tiles_fit());

// Blocks per SM that are planned: they bound the registers.
struct Tile {
  int serial_blocks, sweep_blocks, newton_blocks;
};
constexpr Tile tile_of(int size) {
  return {.serial_blocks = size == 8 ? 3 : 4, .sweep_blocks = size == 8 ? 2 : 4, .newton_blocks = 1};
}

// Compulsory global memory traffic: every tensor once.
constexpr int64_t tokens(const Inputs& in) {
  return in.sequences.batch * in.sequences.length * in.channels;
}
constexpr int64_t pieces(const Inputs& in) {  // of a row, each with its checkpoint
  return ceil_div(in.sequences.length, kKept);
}
constexpr int64_t checkpoints_bytes(const Inputs& in, const Array& x) {
  return x ? in.sequences.batch * pieces(in) * in.channels * in.sizes().states * size_of(x.dtype) : 0;
}
constexpr int64_t states_bytes(const Inputs& in, const Array& x) {
  return x ? in.sequences.count * in.channels * in.sizes().states * size_of(x.dtype) : 0;
}
constexpr int64_t weights_bytes(const Inputs& in, const Array& x) {
  return x ? in.channels * in.sizes().weights * size_of(x.dtype) : 0;
}
constexpr int64_t time_bytes(const Inputs& in) {  // of what is said about tokens
  const Sequences& s = in.sequences;
  return (s.cu_seqlens ? (s.count + 1) * (s.cu_seqlens_is_int64 ? 8 : 4) : 0) + (in.reset ? s.batch * s.length : 0);
}
constexpr int64_t fwd_bytes(const FwdParams& p) {
  return tokens(p) * (p.sizes().gates * size_of(p.x.dtype) + size_of(p.h.dtype)) + weights_bytes(p, p.weights) +
         time_bytes(p) + states_bytes(p, p.initial_state) + states_bytes(p, p.final_state) +
         checkpoints_bytes(p, p.checkpoints);
}

// A warp for each chain; a block for each tile of one.
constexpr time_scan::Cut cut_chains(const Inputs& in) {
  return time_scan::cut_time({.batch = in.sequences.batch,
                              .length = in.sequences.length,
                              .channels = in.channels,
                              .split_time = false,
                              .input_bytes = 0,
                              .tokens = 1,
                              .element = 0,
                              .carry = 0,
                              .accumulator = in.accumulator});
}
constexpr time_scan::Cut cut_tiles(const Inputs& in, int64_t tiles, int warps) {
  time_scan::Cut cut = cut_chains(in);
  cut.path = time_scan::Path::kTwoPass, cut.tiles = tiles;
  cut.blocks = cut.chains * tiles, cut.threads = warps * time_scan::kChannels;
  return cut;
}

// Shooting: P chunks of a row, as many as fill the GPU together with the lanes that channels take.
constexpr int64_t kShortestChunk = 128;  // tokens; shorter ones: what is between sweeps costs too much
constexpr int64_t kFewestChunks = 8;     // fewer: the sweeps cost more than they save

// At most, of shooting and of newton over a tile; after as many as there are unknowns all is exact.
constexpr int kSweeps = 4, kPasses = 10;
constexpr int most_sweeps(const FwdParams& p, int64_t by_default, int64_t unknowns) {
  const int64_t sweeps = p.max_sweeps > 0 ? p.max_sweeps : by_default;
  return static_cast<int>(sweeps < unknowns ? sweeps : unknowns);
}

constexpr int64_t chunks_of(const Inputs& in) {
  const int64_t lanes = cut_chains(in).chains * kLanes;
  const int64_t wanted = lanes > 0 ? ceil_div(time_scan::kFullGpuChannels, lanes) : 1;
  const int64_t most = in.sequences.length / kShortestChunk;
  return wanted < most ? wanted : most > 1 ? most : 1;
}

struct Choice {
  Solver solver;
  int64_t chunks;  // of shooting
  const char* why;
};

constexpr Choice choose(const FwdParams& p) {
  const int64_t chunks = chunks_of(p);
  if (!p.split_time) return {Solver::kSerial, 1, "time is not to be cut"};
  if (p.solver == Solver::kShooting) return {Solver::kShooting, chunks > 2 ? chunks : 2, "as asked for"};
  if (p.solver != Solver::kAutomatic) return {p.solver, 1, "as asked for"};
  if (p.accumulator == DType::kFloat64) return {Solver::kSerial, 1, "fp64"};
  if (chunks >= kFewestChunks) return {Solver::kShooting, chunks, "few channels, many tokens"};
  return {Solver::kSerial, 1, "channels or short rows leave nothing to sweeps"};
}

struct FwdPlan {
  Solver solver;  // never automatic
  const char* why;
  time_scan::Cut cut;  // serial: a warp is a chain; newton: a block is; shooting: a block is kSerialWarps chunks of one
  int64_t chunk, chunks;  // of shooting: tokens of a chunk, chunks of a row
  int sweeps;             // that are launched, or the most iterations of newton
  Tile tile;
  int64_t smem_bytes;
  int64_t flags_at, workspace_bytes;  // in the workspace: what chunks say of themselves; then flags of channels
  int launches;
  int64_t bytes;
};

// What a chunk says of a channel: the state it began with and the one it ends with, R and Q, S numbers each, M and N.
constexpr int chunk_numbers(int states) {
  return 2 * states * (2 + states);
}

constexpr FwdPlan plan_fwd(const FwdParams& p, Choice choice) {
  const Shape of = shape_of(p.cell, p.accumulator);
  FwdPlan plan{.solver = choice.solver,
               .why = choice.why,
               .cut = cut_chains(p),
               .chunk = p.sequences.length,
               .chunks = 1,
               .sweeps = 0,
               .tile = tile_of(of.size),
               .smem_bytes = walk_smem_bytes(of),
               .flags_at = 0,
               .workspace_bytes = 0,
               .launches = 1,
               .bytes = fwd_bytes(p)};
  if (plan.solver == Solver::kShooting) {
    plan.chunk = ceil_div(ceil_div(p.sequences.length, choice.chunks), kKept) * kKept;
    plan.chunks = plan.chunk > 0 ? ceil_div(p.sequences.length, plan.chunk) : 1;
    if (plan.chunks <= 1) plan.solver = Solver::kSerial, plan.chunk = p.sequences.length, plan.chunks = 1;
  }
  const int64_t lanes = plan.cut.chains * kLanes;
  if (plan.solver == Solver::kShooting) {
    plan.cut = cut_tiles(p, ceil_div(plan.chunks, time_scan::kSerialWarps), time_scan::kSerialWarps);
    plan.sweeps = most_sweeps(p, kSweeps, plan.chunks);
    plan.launches = plan.sweeps + 1;
    plan.flags_at = 2 * lanes * plan.chunks * chunk_numbers(of.states) * of.size;
    plan.workspace_bytes = plan.flags_at + 2 * lanes;
  } else if (plan.solver == Solver::kNewton) {
    plan.cut = cut_tiles(p, 1, time_scan::kTileWarps);
    plan.sweeps = most_sweeps(p, kPasses, time_scan::kTileWarps * newton_tokens(of));
    plan.smem_bytes = newton_smem_bytes(of);
    plan.launches = 2;
    plan.workspace_bytes = lanes;
  }
  plan.launches += p.final_state && may_be_empty(p.sequences) ? 1 : 0;
  return plan;
}
constexpr FwdPlan plan_fwd(const FwdParams& p) {
  return plan_fwd(p, choose(p));
}
constexpr int64_t fwd_workspace_bytes(const FwdParams& p) {
  return plan_fwd(p).workspace_bytes;
}

// The launches, on a plan that need not be the one that would be chosen. Serial ones may be of marked channels only:
// (chains, 32) flags, or nullptr.
void fwd(const FwdParams& p, const FwdPlan& plan, Stream stream);
void serial(const FwdParams& p, const bool* marked, Stream stream);
void newton(const FwdParams& p, const FwdPlan& plan, Stream stream);
void shooting(const FwdParams& p, const FwdPlan& plan, Stream stream);

constexpr int kSmallThreads = 256;  // of the kernels beside the scans

// Instances of kernels, each for five cells in fp32 and fp64. And one that passes states on.
constexpr int kFwdKernels = 2 * kCells + 1, kShootingKernels = 2 * kCells, kNewtonKernels = 2 * kCells;

}  // namespace seqkern::elementwise_rnn::cuda

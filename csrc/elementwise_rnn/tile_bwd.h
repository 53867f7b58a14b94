// How the backward is cut on a GPU. Pure functions of shape; see tile.h. The adjoint is a scan, on one of the three
// paths of common/time_tile.h.
#pragma once
#include "elementwise_rnn/tile.h"

namespace seqkern::elementwise_rnn::cuda {

// What a lane keeps of a token in shared memory, in numbers: the gates, dh, and the state before it.
constexpr int bwd_numbers(const CellSizes& sizes) {
  return sizes.gates + 1 + sizes.states;
}
// Tokens of a chunk: a piece, or a part of one where shared memory has no room for it.
constexpr int bwd_tokens(Cell cell, DType accumulator, bool tiled) {
  const bool large = accumulator == DType::kFloat64 || (tiled && bwd_numbers(sizes_of(cell)) > 5);
  return large ? kKept / 2 : kKept;
}

// Blocks per SM that are planned: they bound the registers.
struct BwdTile {
  int serial_blocks, tile_blocks;
};
constexpr BwdTile bwd_tile(DType accumulator) {
  return {.serial_blocks = accumulator == DType::kFloat64 ? 3 : 4, .tile_blocks = 2};
}

// Shared memory: the tokens of a block's lanes; and in a tile what its chunks do to a gradient, elements of a matrix
// and a vector and states of S numbers (time_scan::TileShared).
constexpr int bwd_element(const CellSizes& sizes) {
  return sizes.states * (sizes.states + 1);
}
constexpr int64_t bwd_smem_bytes(Cell cell, DType accumulator, bool tiled) {
  const CellSizes sizes = sizes_of(cell);
  const int64_t warps = tiled ? time_scan::kTileWarps : time_scan::kSerialWarps, size = size_of(accumulator);
  const int64_t tokens = warps * bwd_tokens(cell, accumulator, tiled) * bwd_numbers(sizes);
  const int64_t chunks = tiled ? warps * (bwd_element(sizes) + sizes.states) + sizes.states : 0;
  return kLanes * size * (tokens + chunks) + (tiled ? 2 * warps : 0);
}

struct BwdPlan {
  time_scan::Cut cut;
  BwdTile tile;
  int64_t rows;     // of partial sums of dweights, one for each warp of the serial path or for each tile
  int64_t sums_at;  // in the workspace, after what the scan needs: (rows, W, D)
  int64_t smem_bytes, workspace_bytes;
  int launches;
  int64_t bytes;
};

constexpr time_scan::Scan bwd_scan(const BwdParams& p) {
  const CellSizes sizes = p.sizes();
  return {.batch = p.sequences.batch,
          .length = p.sequences.length,
          .channels = p.channels,
          .split_time = p.split_time,
          .input_bytes = tokens(p) * (sizes.gates * size_of(p.x.dtype) + size_of(p.dh.dtype)),
          .tokens = bwd_tokens(p.cell, p.accumulator, true),
          .element = bwd_element(sizes),
          .carry = sizes.states,
          .accumulator = p.accumulator};
}

constexpr int64_t bwd_bytes(const BwdParams& p) {
  return tokens(p) * (2 * p.sizes().gates * size_of(p.x.dtype) + size_of(p.dh.dtype)) +
         checkpoints_bytes(p, p.checkpoints) + weights_bytes(p, p.weights) + weights_bytes(p, p.dweights) +
         time_bytes(p) + states_bytes(p, p.initial_state) + states_bytes(p, p.dfinal_state) +
         states_bytes(p, p.dinitial_state);
}

// fp64 is for checks: it has no tiles.
constexpr BwdPlan plan_bwd(const BwdParams& p, time_scan::Choice choice) {
  if (p.accumulator == DType::kFloat64) choice = {time_scan::Path::kSerial, "fp64"};
  BwdPlan plan{.cut = time_scan::cut_time(bwd_scan(p), choice),
               .tile = bwd_tile(p.accumulator),
               .rows = 0,
               .sums_at = 0,
               .smem_bytes = 0,
               .workspace_bytes = 0,
               .launches = 0,
               .bytes = bwd_bytes(p)};
  plan.smem_bytes = bwd_smem_bytes(p.cell, p.accumulator, plan.cut.path != time_scan::Path::kSerial);
  plan.sums_at = ceil_div(plan.cut.workspace_bytes, 16) * 16;
  plan.workspace_bytes = plan.sums_at;
  if (p.dweights) {
    plan.rows = p.sequences.batch * plan.cut.tiles;
    plan.workspace_bytes += plan.rows * p.sizes().weights * p.channels * size_of(p.accumulator);
  }
  plan.launches = plan.cut.launches + (p.dinitial_state && may_be_empty(p.sequences) ? 1 : 0) + (p.dweights ? 1 : 0);
  return plan;
}
constexpr BwdPlan plan_bwd(const BwdParams& p) {
  return plan_bwd(p, time_scan::choose_path(bwd_scan(p)));
}
constexpr int64_t bwd_workspace_bytes(const BwdParams& p) {
  return plan_bwd(p).workspace_bytes;
}

// (rows, W, D), accumulators.
constexpr Array partial_sums(const BwdParams& p, const BwdPlan& plan) {
  return {static_cast<char*>(p.workspace) + plan.sums_at, p.accumulator};
}

// The launches, on a plan that need not be the one that would be chosen.
void bwd(const BwdParams& p, const BwdPlan& plan, Stream stream);
void bwd_reduce(const BwdParams& p, const BwdPlan& plan, Stream stream);

// Instances of kernels: for each cell serial ones in fp32 and fp64, and tiles in fp32; one that clears flags; sums of
// dweights in both.
constexpr int kBwdKernels = 3 * kCells + 1, kBwdReduceKernels = 2;

}  // namespace seqkern::elementwise_rnn::cuda

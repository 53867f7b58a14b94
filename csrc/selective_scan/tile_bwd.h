// How the backward is cut and what it needs.
#pragma once
#include "selective_scan/warp_tile.h"

namespace seqkern::selective_scan::cuda {

constexpr int kReduceThreads = 256;

struct BwdTile {
  int warps;          // in a block, of 32 channels each, at most
  int sharing;        // warps that share these channels, each with a part of them: registers allow no more
  int window;         // tokens of a tile whose states and decays are in registers at a time
  int blocks_per_sm;  // planned; bounds the registers
};

constexpr BwdTile pick_bwd_tile(DType accumulator, int state_lanes, bool plain) {
  if (accumulator == DType::kFloat64) return {.warps = 1, .sharing = 4, .window = 4, .blocks_per_sm = 2};
  const int sharing = state_lanes == 4 ? 2 : 1;
  if (!plain) return {.warps = 1, .sharing = sharing, .window = 4, .blocks_per_sm = 4};
  return {.warps = 2, .sharing = sharing, .window = 8, .blocks_per_sm = 4 / sharing};
}

// What the workspace holds, as offsets in accumulators.
//
//   carry, decay       (B, segments, N, parts, D): the gradient that enters a segment from the following one; the
//                      product of a segment's decays
//   dA, and dB, dC if constant        (B, segments, N, parts, D): sums over a segment
//   dD, ddelta_bias    (B, segments, D): the same
//   dB, dC if variable                (blocks of channels, B, N, L, parts): sums over the channels of a block
struct BwdWorkspace {
  int64_t carry = 0, decay = 0, dA = 0, dB = 0, dC = 0, dD = 0, ddelta_bias = 0;
  int64_t elements = 0;
};

struct BwdPlan {
  Kind kind;
  BwdTile tile;
  Cut cut;
  int64_t blocks;
  int64_t smem_bytes;
  BwdWorkspace workspace;
};

// Tiles of B and C; four tiles of the channels' data; for each warp the states before each window and its sums of dB
// and dC; and where there are several slices of states, three tiles of sums that wait for the last one.
constexpr int64_t bwd_smem_bytes(const BwdTile& tile, DType accumulator, int state_lanes, bool sliced) {
  const int64_t R = size_of(accumulator);
  const int64_t kept = kTokens / tile.window * (state_lanes / tile.sharing) * 32 * 16;
  const int64_t sums = kTokens * (2 * state_lanes * 16 + R);
  return 2 * kTokens * (state_lanes + 1) * 16 + tile.warps * data_tiles_bytes(sliced ? 7 : 4, accumulator) +
         tile.warps * tile.sharing * (kept + sums);
}

// Elements of the sums of dB or dC.
constexpr int64_t projection_elements(const Inputs& in, const Cut& cut, const Projection& x) {
  if (x.constant()) return segment_elements(in, cut);
  const int64_t channel_blocks = cut.piece > 0 ? in.channels / cut.piece * cut.blocks : 0;
  return channel_blocks * in.sequences.batch * in.states * in.sequences.length * in.parts();
}

constexpr BwdPlan plan_bwd(const BwdParams& p) {
  BwdPlan plan{};
  plan.kind = pick_kind(p);
  plan.tile = pick_bwd_tile(p.accumulator, state_lanes(plan.kind), is_plain(plan.kind));
  plan.cut = cut_of(p, plan.tile.warps);
  plan.blocks = blocks_of(p, plan.cut);
  plan.smem_bytes = bwd_smem_bytes(plan.tile, p.accumulator, state_lanes(plan.kind), num_slices(p) > 1);
  BwdWorkspace& w = plan.workspace;
  const auto take = [&](int64_t& offset, int64_t elements) {
    offset = w.elements, w.elements += ceil_div(elements, 4) * 4;  // aligned for vectors
  };
  const int64_t states = segment_elements(p, plan.cut), channels = p.sequences.batch * plan.cut.segments * p.channels;
  if (plan.cut.segments > 1 || num_slices(p) > 1) take(w.carry, states);
  if (plan.cut.segments > 1) take(w.decay, states);
  take(w.dA, states);
  take(w.dB, projection_elements(p, plan.cut, p.B));
  take(w.dC, projection_elements(p, plan.cut, p.C));
  take(w.dD, channels), take(w.ddelta_bias, channels);
  return plan;
}

constexpr int64_t bwd_workspace_bytes(const BwdParams& p) {
  return plan_bwd(p).workspace.elements * size_of(p.accumulator);
}

// What bwd() is made of: before its kernel, the carries of segments; after it, sums over segments and blocks.
void bwd_carry(const BwdParams& p, const BwdPlan& plan, Stream stream);
void bwd_reduce(const BwdParams& p, const BwdPlan& plan, Stream stream);

// Kernel instances: one for each kind; for each scalar the carries that leave segments; for each accumulator
// the sums of parameters, and of dB and dC.
constexpr int kBwdKernels = 7;
constexpr int kBwdCarryKernels = 4;
constexpr int kBwdReduceKernels = 2 * 2;

}  // namespace seqkern::selective_scan::cuda

// How the backward is cut on a GPU and what it needs.
#pragma once
#include "delta_rule/tile.h"

namespace seqkern::delta_rule::cuda {

constexpr int kBwdThreads = 256;

constexpr ChunkTile kBwdTiles[] = {
    {DType::kBFloat16, false, 32, 128, 64, 2}, {DType::kBFloat16, false, 32, 256, 32, 1},
    {DType::kFloat32, false, 32, 128, 32, 1},  {DType::kFloat32, false, 16, 256, 32, 1},
    {DType::kFloat64, false, 16, 256, 8, 1},
};
constexpr int kBwdKernels = 5;

// The first that holds all keys. Only the last launch tells decays per key from others.
constexpr ChunkTile pick_bwd_tile(const Inputs& in) {
  for (ChunkTile tile : kBwdTiles) {
    tile.per_key = in.form == Decay::kKey;
    if (tile.operand == operand_of(in.q.dtype) && tile.keys >= in.keys) return tile;
  }
  return {};
}

// What the workspace holds behind that of the scores, as offsets in bytes; R accumulators, T operands. A boundary is
// the place between two chunks of a sequence: `boundaries` of a batch row.
//
//   states, dstates   (B, boundaries, HV, tiles, keys, values) T   the state at a boundary, and its gradient
//   w                 (B, L, HV, tiles values) T                   [dsolve]
//   elements          (rows, segments, HV) elements R              what segments do, where time is cut
struct BwdPlan {
  ChunkTile tile;
  int64_t rows;            // sequences of cu_seqlens, or batch rows
  int64_t tiles;           // of a head's values
  int64_t identity_tiles;  // of the columns of an identity matrix (keys, keys)
  int64_t segments;        // of a row
  int64_t boundaries;
  ScoresPlan scores;
  int64_t element_blocks, walk_blocks, token_blocks;
  int64_t walk_smem_bytes, token_smem_bytes;
  int64_t states, dstates, w, elements, workspace_bytes;
  int launches;
  int64_t bytes;
};

// Accumulators of a segment's element: decays, S and dS of every tile of values, and the matrix that a gradient is
// multiplied by.
constexpr int64_t bwd_element_numbers(const ChunkTile& tile, int64_t tiles) {
  return tile.keys * (1 + 2 * tiles * tile.values + tile.keys);
}

// Shared memory of a block of the walk (WalkShared), rounded up.
constexpr int64_t bwd_walk_smem_bytes(const ChunkTile& tile) {
  const int64_t T = size_of(tile.operand), R = size_of(accumulator(tile.operand));
  const int64_t C = tile.tokens, K = tile.keys, V = tile.values;
  const int64_t turns = fetches_ahead(tile.operand) ? 2 : 1;
  return (turns + 1) * matrix_bytes(C, K, T) + matrix_bytes(K, V, T) + 2 * matrix_bytes(C, V, T) +
         matrix_bytes(C, V, R) + matrix_bytes(C, C, T) + matrix_bytes(C, C, R) + turns * round_up((7 * C + 1) * R, 16) +
         (turns + 1) * K * R + 160;
}

// Of a block of the last launch (TokenShared, KeyShared), rounded up.
constexpr int64_t bwd_token_smem_bytes(const ChunkTile& tile) {
  const int64_t T = size_of(tile.operand), R = size_of(accumulator(tile.operand));
  const int64_t C = tile.tokens, K = tile.keys, V = tile.values, warps = kBwdThreads / 32;
  const int64_t shared = matrix_bytes(K, V, T) + 2 * matrix_bytes(C, V, T) + (K + (12 + warps) * C + 1) * R;
  const int64_t of_chunk = tile.per_key ? 2 * matrix_bytes(C, K, R) + (C + K / 32) * C * R
                                        : 2 * matrix_bytes(C, K, T) + matrix_bytes(C, C, T) + 8 * C * R;
  return shared + of_chunk + 160;
}

// Compulsory global memory traffic: every tensor once.
constexpr int64_t bwd_bytes(const BwdParams& p) {
  const Sequences& s = p.sequences;
  const int64_t decays = p.form == Decay::kKey ? p.keys : 1, states = s.count * p.value_heads * p.keys * p.size;
  int64_t bytes = sequences_bytes(s);
  for (const Data& x : {p.q, p.k, p.erase, p.dq, p.dk, p.derase}) bytes += token_bytes(s, x, p.heads, p.keys);
  for (const Data& x : {p.v, p.u, p.dO, p.dv}) bytes += token_bytes(s, x, p.value_heads, p.size);
  for (const Data& x : {p.beta, p.dbeta}) bytes += token_bytes(s, x, p.value_heads, 1);
  for (const Data& x : {p.decay, p.ddecay}) bytes += token_bytes(s, x, p.value_heads, decays);
  for (const Array& x : {p.initial_state, p.dfinal_state, p.dinitial_state}) bytes += x ? states * size_of(x.dtype) : 0;
  return bytes;
}

// Tests name a number of segments of their own.
constexpr BwdPlan plan_bwd(const BwdParams& p, int64_t segments) {
  BwdPlan plan{};
  plan.tile = pick_bwd_tile(p);
  plan.bytes = bwd_bytes(p);
  if (plan.tile.keys == 0) return plan;
  const ChunkTile& tile = plan.tile;
  const Sequences& s = p.sequences;
  plan.rows = row_count(s);
  plan.tiles = at_least(1, ceil_div(p.size, tile.values));
  plan.identity_tiles = ceil_div(p.keys, tile.values);
  plan.boundaries = ceil_div(s.length, tile.tokens);
  const int64_t walks = 2 * plan.rows * p.value_heads * plan.tiles;  // forward, and backward
  plan.segments = segments > 0 ? segments : choose_segments(s, p.split_time, tile, walks);
  plan.walk_blocks = walks * plan.segments;
  plan.element_blocks =
      plan.segments > 1 ? plan.rows * plan.segments * p.value_heads * (2 * plan.tiles + plan.identity_tiles) : 0;
  plan.walk_smem_bytes = bwd_walk_smem_bytes(tile), plan.token_smem_bytes = bwd_token_smem_bytes(tile);
  plan.scores = plan_scores(p, tile.tokens, 0, true, true);
  plan.token_blocks = plan.scores.slots * p.heads;
  plan.workspace_bytes = plan.scores.end;
  const auto take = [&](int64_t numbers, DType dtype) {
    const int64_t at = plan.workspace_bytes;
    plan.workspace_bytes += round_up(numbers * size_of(dtype), 16);
    return at;
  };
  const int64_t states = s.batch * plan.boundaries * p.value_heads * plan.tiles * tile.keys * tile.values;
  plan.states = take(states, tile.operand), plan.dstates = take(states, tile.operand);
  plan.w = take(s.batch * s.length * p.value_heads * plan.tiles * tile.values, tile.operand);
  if (plan.segments > 1)
    plan.elements =
        take(plan.rows * plan.segments * p.value_heads * bwd_element_numbers(tile, plan.tiles), p.accumulator);
  plan.launches = plan.segments > 1 ? 4 : 3;
  return plan;
}
constexpr BwdPlan plan_bwd(const BwdParams& p) {
  return plan_bwd(p, 0);
}

constexpr int64_t bwd_workspace_bytes(const BwdParams& p) {
  return plan_bwd(p).workspace_bytes;
}

// The launches, on a plan that need not be the one that would be chosen.
void bwd(const BwdParams& p, const BwdPlan& plan, Stream stream);

}  // namespace seqkern::delta_rule::cuda

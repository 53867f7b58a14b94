// Pure functions of shape: how the work is cut on a GPU and what it needs. Callable without a GPU; the launches use the
// same plans that are printed. The forward; tile_bwd.h and tile_step.h have the others.
#pragma once
#include "common/chunk_tile.h"
#include "linear_attention/params.h"

namespace seqkern::linear_attention::cuda {

constexpr int kFwdThreads = 256;
constexpr int kMaxKeys = 256;

constexpr ChunkTile kFwdTiles[] = {
    {DType::kBFloat16, false, 64, 64, 64, 2},  {DType::kBFloat16, false, 64, 128, 64, 2},
    {DType::kBFloat16, false, 32, 256, 64, 1}, {DType::kBFloat16, true, 32, 128, 64, 2},
    {DType::kBFloat16, true, 32, 256, 32, 1},  {DType::kFloat32, false, 32, 128, 64, 1},
    {DType::kFloat32, false, 16, 256, 32, 1},  {DType::kFloat32, true, 32, 128, 64, 1},
    {DType::kFloat32, true, 16, 256, 32, 1},   {DType::kFloat64, false, 16, 256, 8, 1},
    {DType::kFloat64, true, 16, 256, 8, 1},
};
constexpr int kFwdKernels = 11;

// The first that holds all keys.
constexpr ChunkTile pick_fwd_tile(const Inputs& in) {
  for (const ChunkTile& tile : kFwdTiles) {
    const bool fits = tile.operand == operand_of(in.q.dtype) && tile.per_key == (in.gates.form == Form::kKey);
    if (fits && tile.keys >= in.keys) return tile;
  }
  return {};
}

// Compulsory global memory traffic: every tensor once.
constexpr int64_t state_bytes(const Inputs& in, const State& state) {
  const int64_t heads = in.sequences.count * in.value_heads;
  const auto bytes = [](const Array& x, int64_t count) { return x ? count * size_of(x.dtype) : 0; };
  return bytes(state.S, heads * in.keys * in.size) + bytes(state.z, heads * in.keys) + bytes(state.m, heads);
}
constexpr int64_t input_bytes(const Inputs& in) {
  const Sequences& s = in.sequences;
  const bool constant = in.gates.decay.b == 0 && in.gates.decay.l == 0;
  return token_bytes(s, in.q, in.heads, in.keys) + token_bytes(s, in.k, in.heads, in.keys) +
         token_bytes(s, in.v, in.value_heads, in.size) + token_bytes(s, in.gate, in.value_heads, in.size) +
         (constant ? 0 : token_bytes(s, in.gates.decay, in.value_heads, in.gates.form == Form::kKey ? in.keys : 1)) +
         token_bytes(s, in.gates.input, in.value_heads, 1) + state_bytes(in, in.initial_state) + sequences_bytes(s);
}
constexpr int64_t fwd_bytes(const FwdParams& p) {
  const int64_t kept = (p.denominators ? 1 : 0) + (p.maxima ? 1 : 0);
  return input_bytes(p) + token_bytes(p.sequences, p.y, p.value_heads, p.size) +
         token_bytes(p.sequences, p.o, p.value_heads, p.size) +
         kept * p.sequences.batch * p.sequences.length * p.value_heads * size_of(p.accumulator) +
         state_bytes(p, p.final_state);
}

// Accumulators of a segment's element: S, z, decays, and three more.
constexpr int64_t element_numbers(const ChunkTile& tile) {
  return tile.keys * (tile.values + 2) + 4;
}

// What a block has in the workspace for want of shared memory: fp64 decays per key.
constexpr int64_t fwd_room_bytes(const ChunkTile& tile) {
  return tile.per_key && tile.operand == DType::kFloat64 ? matrix_bytes(tile.tokens, tile.keys, 8) : 0;
}

// Shared memory of a block (FwdShared).
constexpr int64_t fwd_smem_bytes(const ChunkTile& tile) {
  const int64_t T = size_of(tile.operand), R = size_of(accumulator(tile.operand));
  return 2 * matrix_bytes(tile.tokens, tile.keys, T) + matrix_bytes(tile.tokens, tile.values, T) +
         matrix_bytes(tile.tokens, tile.tokens, T) + matrix_bytes(tile.keys, tile.values, T) +
         (tile.per_key ? matrix_bytes(tile.tokens, tile.keys, R) : 32) +
         (8 * tile.tokens + tile.keys + tile.values + 6) * R + 96 - fwd_room_bytes(tile);
}

struct FwdPlan {
  ChunkTile tile;
  int64_t rows;   // sequences of cu_seqlens, or batch rows
  int64_t tiles;  // of a head's values
  int64_t segments;
  int64_t blocks, smem_bytes;
  int64_t rooms, workspace_bytes;  // segments' elements, and from `rooms` on what has no room in shared memory
  int launches;
  int64_t bytes;
};

// Tests name a number of segments of their own.
constexpr FwdPlan plan_fwd(const FwdParams& p, int64_t segments) {
  FwdPlan plan{.tile = pick_fwd_tile(p),
               .rows = row_count(p.sequences),
               .tiles = 1,
               .segments = segments,
               .blocks = 0,
               .smem_bytes = 0,
               .rooms = 0,
               .workspace_bytes = 0,
               .launches = 0,
               .bytes = fwd_bytes(p)};
  if (plan.tile.keys > 0 && p.size > 0) plan.tiles = ceil_div(p.size, plan.tile.values);
  plan.blocks = plan.rows * p.value_heads * plan.tiles;
  plan.smem_bytes = fwd_smem_bytes(plan.tile);
  if (segments == 0) plan.segments = choose_segments(p.sequences, p.split_time, plan.tile, plan.blocks);
  const int64_t elements = (plan.segments - 1) * plan.blocks * element_numbers(plan.tile);
  plan.rooms = round_up(elements * size_of(p.accumulator), 16);
  plan.workspace_bytes = plan.rooms + plan.segments * plan.blocks * fwd_room_bytes(plan.tile);
  plan.launches = plan.segments > 1 ? 2 : 1;
  return plan;
}
constexpr FwdPlan plan_fwd(const FwdParams& p) {
  return plan_fwd(p, 0);
}

constexpr int64_t fwd_workspace_bytes(const FwdParams& p) {
  return plan_fwd(p).workspace_bytes;
}

// The launches, on a plan that need not be the one that would be chosen.
void fwd(const FwdParams& p, const FwdPlan& plan, Stream stream);

}  // namespace seqkern::linear_attention::cuda

// How the backward is cut on a GPU and what it needs.
#pragma once
#include "linear_attention/tile.h"

namespace seqkern::linear_attention::cuda {

constexpr int kBwdThreads = 256;
constexpr int kBwdReduceThreads = 256;

// The gradient of the state is in registers. Each tile is listed behind those with fewer keys. Where the shared memory
// of the smallest devices is too little, a part of each block's is in the workspace.
constexpr ChunkTile kBwdTiles[] = {
    {DType::kBFloat16, false, 64, 64, 64, 1},   {DType::kBFloat16, false, 64, 128, 64, 1},
    {DType::kBFloat16, false, 32, 128, 128, 1}, {DType::kBFloat16, false, 32, 256, 64, 1},
    {DType::kFloat32, false, 32, 128, 64, 1},   {DType::kFloat32, false, 16, 256, 32, 1},
    {DType::kFloat64, false, 16, 256, 8, 1},    {DType::kBFloat16, true, 16, 128, 64, 1},
    {DType::kBFloat16, true, 16, 256, 32, 1},   {DType::kFloat32, true, 16, 128, 32, 1},
    {DType::kFloat32, true, 16, 256, 32, 1},    {DType::kFloat64, true, 16, 256, 8, 1},
};
constexpr int kBwdKernels = 12;
constexpr int kBwdReduceKernels = 2;

// Of those with the fewest keys that hold all, the first that holds all values, or the one with most.
constexpr ChunkTile pick_bwd_tile(const Inputs& in) {
  ChunkTile found{};
  for (const ChunkTile& tile : kBwdTiles) {
    const bool fits = tile.operand == operand_of(in.q.dtype) && tile.per_key == (in.gates.form == Form::kKey);
    if (!fits || tile.keys < in.keys) continue;
    if (found.keys == 0 || (tile.keys == found.keys && found.values < in.size)) found = tile;
  }
  return found;
}

// What the workspace holds, as offsets in bytes; R accumulators, T operands. A walk is that of a row, a segment and a
// tile of values: P = rows segments tiles of them for each value head.
//
//   states      (B, slots, HV, tiles, keys, values) T   the state before each chunk but the first of a sequence
//   sums        (B, slots, HV, tiles, keys) R           z of the same, with a normalizer
//   elements    (P, HV) elements R                      what a segment does to states and to their gradients
//   dq, dk      (tiles, B, L, HV, keys) R               where value heads or tiles share a row, or K is odd
//   ddecay, dinput, dz, dm   (tiles, ...) R             where tiles share a number
//   dA, dbias, ddecay if constant   (P, HV) R
//   dbonus      (P, HV, K) R
//   dskip       (P, HV) R, or (rows segments, HV, V) R
//   rooms       (blocks, bwd_room_bytes)                in the place of shared memory
struct BwdWorkspace {
  int64_t states = 0, sums = 0, elements = 0, dq = 0, dk = 0, ddecay = 0, dinput = 0, dz = 0, dm = 0;
  int64_t dA = 0, dbias = 0, dbonus = 0, dskip = 0, rooms = 0;
  int64_t bytes = 0;
};

struct BwdPlan {
  ChunkTile tile;
  int64_t rows;      // sequences of cu_seqlens, or batch rows
  int64_t tiles;     // of a head's values
  int64_t segments;  // of a row
  int64_t slots;     // of a batch row: chunks of which the state is kept
  bool share_keys;   // dq and dk are sums over blocks
  int64_t blocks, smem_bytes;
  int launches;
  BwdWorkspace workspace;
};

// Accumulators of a segment's element: S, dS, z, dz, decays, and two more.
constexpr int64_t bwd_element_numbers(const ChunkTile& tile) {
  return tile.keys * (2 * tile.values + 3) + 2;
}

constexpr bool is_constant(const BwdParams& p) {
  return p.gates.form == Form::kToken && p.ddecay.l == 0;
}

// Of decays per key, what KeyShared has besides a WalkShared.
constexpr int64_t key_bytes(const ChunkTile& tile) {
  const int64_t C = tile.tokens, K = tile.keys, R = size_of(accumulator(tile.operand));
  return 4 * matrix_bytes(C, K, R) + (C * C * (1 + K / 32) + (tile.values >= 16 ? 3 : 2) * K) * R;
}
// What a block has in the workspace for want of shared memory (KeyRoom, TokenRoom).
constexpr int64_t bwd_room_bytes(const ChunkTile& tile) {
  const int64_t C = tile.tokens, R = size_of(accumulator(tile.operand));
  if (tile.per_key) return tile.keys == kMaxKeys ? key_bytes(tile) : 0;
  return tile.operand == DType::kFloat64 ? matrix_bytes(C, C, R) + 16 * C * R : 0;
}

// Shared memory of a block (TokenShared, KeyShared), rounded up.
constexpr int64_t bwd_smem_bytes(const ChunkTile& tile) {
  const int64_t T = size_of(tile.operand), R = size_of(accumulator(tile.operand));
  const int64_t C = tile.tokens, K = tile.keys, V = tile.values;
  const int64_t operands =
      2 * matrix_bytes(C, K, T) + 2 * matrix_bytes(C, V, T) + matrix_bytes(K, V, T) + matrix_bytes(C, C, T);
  const int64_t state = matrix_bytes(K, V, R);
  const int64_t shared = (operands > state ? operands : state) + (3 * K + 4 * C + 8) * R + 128;
  const int64_t of_chunk = tile.per_key ? key_bytes(tile) : matrix_bytes(C, C, T) + ((C >= 32 ? 22 : 27) * C + 4) * R;
  return shared + of_chunk - bwd_room_bytes(tile);
}

constexpr BwdWorkspace bwd_workspace(const BwdParams& p, const BwdPlan& plan) {
  BwdWorkspace w;
  const auto take = [&](int64_t& offset, bool wanted, int64_t elements, DType dtype) {
    if (!wanted) return;
    offset = w.bytes, w.bytes += round_up(elements * size_of(dtype), 16);
  };
  const DType R = p.accumulator;
  const int64_t HV = p.value_heads, K = p.keys, tokens = p.sequences.batch * p.sequences.length * HV;
  const int64_t kept = p.sequences.batch * plan.slots * HV * plan.tiles * plan.tile.keys;
  const int64_t walks = plan.rows * plan.segments * plan.tiles * HV, states = p.sequences.count * HV;
  const bool normalized = p.normalizer != Normalizer::kNone, shared = plan.tiles > 1;
  take(w.states, true, kept * plan.tile.values, plan.tile.operand);
  take(w.sums, normalized, kept, R);
  take(w.elements, plan.segments > 1, walks * bwd_element_numbers(plan.tile), R);
  take(w.dq, plan.share_keys, plan.tiles * tokens * plan.tile.keys, R);
  take(w.dk, plan.share_keys, plan.tiles * tokens * plan.tile.keys, R);
  if (is_constant(p))
    take(w.ddecay, true, walks, R);
  else
    take(w.ddecay, p.ddecay && shared, plan.tiles * tokens * (p.gates.form == Form::kKey ? K : 1), R);
  take(w.dinput, p.dinput && shared, plan.tiles * tokens, R);
  take(w.dz, p.dinitial_state.z && shared, plan.tiles * states * K, R);
  take(w.dm, p.dinitial_state.m && shared, plan.tiles * states, R);
  take(w.dA, static_cast<bool>(p.dA), walks, R);
  take(w.dbias, static_cast<bool>(p.dbias), walks, R);
  take(w.dbonus, static_cast<bool>(p.dbonus), walks * K, R);
  take(w.dskip, static_cast<bool>(p.dskip), p.skip_v == 0 ? walks : walks / plan.tiles * p.size, R);
  take(w.rooms, true, walks * bwd_room_bytes(plan.tile) / size_of(R), R);
  return w;
}

// Tests name a number of segments of their own.
constexpr BwdPlan plan_bwd(const BwdParams& p, int64_t segments) {
  BwdPlan plan{.tile = pick_bwd_tile(p),
               .rows = row_count(p.sequences),
               .tiles = 1,
               .segments = segments,
               .slots = 0,
               .share_keys = p.value_heads > p.heads,
               .blocks = 0,
               .smem_bytes = 0,
               .launches = 2,
               .workspace = {}};
  if (plan.tile.keys == 0) return plan;
  if (p.size > 0) plan.tiles = ceil_div(p.size, plan.tile.values);
  plan.share_keys = plan.share_keys || plan.tiles > 1 || p.keys % 2 == 1;
  const int64_t walks = plan.rows * p.value_heads * plan.tiles;
  if (segments == 0) plan.segments = choose_segments(p.sequences, p.split_time, plan.tile, walks);
  plan.smem_bytes = bwd_smem_bytes(plan.tile);
  plan.slots = ceil_div(p.sequences.length, plan.tile.tokens);
  plan.blocks = walks * plan.segments;
  plan.launches = plan.segments > 1 ? 3 : 2;
  plan.workspace = bwd_workspace(p, plan);
  return plan;
}
constexpr BwdPlan plan_bwd(const BwdParams& p) {
  return plan_bwd(p, 0);
}

constexpr int64_t bwd_workspace_bytes(const BwdParams& p) {
  return plan_bwd(p).workspace.bytes;
}

// Compulsory global memory traffic: every tensor once.
constexpr int64_t bwd_bytes(const BwdParams& p) {
  const bool constant = is_constant(p);
  const int64_t numbers = p.sequences.batch * p.sequences.length * p.value_heads * size_of(p.accumulator);
  return input_bytes(p) + token_bytes(p.sequences, p.dy, p.value_heads, p.size) +
         token_bytes(p.sequences, p.o, p.value_heads, p.size) +
         ((p.denominators ? 1 : 0) + (p.maxima ? 1 : 0)) * numbers + token_bytes(p.sequences, p.dq, p.heads, p.keys) +
         token_bytes(p.sequences, p.dk, p.heads, p.keys) + token_bytes(p.sequences, p.dv, p.value_heads, p.size) +
         token_bytes(p.sequences, p.dgate, p.value_heads, p.size) +
         (constant ? 0 : token_bytes(p.sequences, p.ddecay, p.value_heads, p.gates.form == Form::kKey ? p.keys : 1)) +
         token_bytes(p.sequences, p.dinput, p.value_heads, 1) + state_bytes(p, p.dfinal_state) +
         state_bytes(p, p.dinitial_state);
}

// The launches, on a plan that need not be the one that would be chosen.
void bwd(const BwdParams& p, const BwdPlan& plan, Stream stream);

}  // namespace seqkern::linear_attention::cuda

// Pure functions of shape: how the work is cut on a GPU and what it needs. Callable without a GPU; the launches use the
// same plans that are printed. The scores, which forward and backward share, and the forward.
#pragma once
#include "common/chunk_tile.h"
#include "delta_rule/params.h"

namespace seqkern::delta_rule::cuda {

constexpr int kScoresThreads = 128;
constexpr int kFwdThreads = 256;
constexpr int kMaxKeys = 256;

// --- scores

// What the scores' kernel leaves in the workspace, as offsets in bytes. A chunk's slot is a number that no other chunk
// has (ChunkSlots in chunk.cuh); T is the operands' type, R the accumulators'.
//
//   records       (slots, HV) ChunkRecord<T, tokens>   P, (I + diag(beta) A)^-1, and the factors of tokens
//   A             (slots, HV, tokens, tokens) R        A_ij, 0 for j >= i; where the backward asks for it
//   total         (slots, HV, K) R                     exp(c_C); decays per key only, as the next three
//   q, erase, k   (B, L, HV, K) T, by memory place     exp(c_i) * q_i, exp(c_i) * e_i, exp(c_C - c_j) * k_j, normalized
struct ScoresPlan {
  DType operand;
  bool per_key;
  int tokens;  // of a chunk: 32 or 16
  int64_t slots, blocks, smem_bytes;
  bool keeps_A, keeps_rows;
  int64_t record_bytes;
  int64_t records, A, total, q, erase, k;
  int64_t end;  // of all that, a multiple of 16
};

constexpr int64_t slot_count(const Sequences& s, int tokens) {
  return s.cu_seqlens ? s.length / tokens + s.count : s.batch * ceil_div(s.length, tokens);
}

// sizeof(ChunkRecord<T, tokens>)
constexpr int64_t record_bytes(DType operand, int64_t tokens) {
  const int64_t T = size_of(operand), R = size_of(accumulator(operand));
  return tokens * tokens * (T + R) + (7 * tokens + 1) * R + (16 - R);
}

constexpr int kSlab = 64;  // keys that a block takes at once
constexpr int kScoresKernels = 7;

// What the products are taken in: decays per key are multiplied into rows, which must lose nothing by that.
constexpr DType scores_in(DType operand, bool per_key) {
  return per_key ? accumulator(operand) : operand;
}

// Shared memory of a block (ScoresShared), rounded up.
constexpr int64_t scores_smem_bytes(DType compute, bool per_key, int64_t tokens) {
  const int64_t T = size_of(compute), R = size_of(accumulator(compute));
  return 3 * matrix_bytes(tokens, kSlab, T) + (per_key ? matrix_bytes(tokens, kSlab, R) : 0) +
         3 * matrix_bytes(tokens, tokens, R) + (7 * tokens + 1) * R + 128;
}

// The workspace begins at `begin`; keeps_rows: q, erase, k and total, where decays are per key.
constexpr ScoresPlan plan_scores(const Inputs& in, int tokens, int64_t begin, bool keeps_A, bool keeps_rows) {
  ScoresPlan plan{.operand = operand_of(in.q.dtype),
                  .per_key = in.form == Decay::kKey,
                  .tokens = tokens,
                  .slots = slot_count(in.sequences, tokens),
                  .blocks = 0,
                  .smem_bytes = 0,
                  .keeps_A = keeps_A,
                  .keeps_rows = keeps_rows && in.form == Decay::kKey,
                  .record_bytes = record_bytes(operand_of(in.q.dtype), tokens),
                  .records = 0,
                  .A = 0,
                  .total = 0,
                  .q = 0,
                  .erase = 0,
                  .k = 0,
                  .end = begin};
  const int64_t T = size_of(plan.operand), R = size_of(accumulator(plan.operand));
  plan.blocks = plan.slots * in.value_heads;
  plan.smem_bytes = scores_smem_bytes(scores_in(plan.operand, plan.per_key), plan.per_key, tokens);
  const auto take = [&](bool wanted, int64_t bytes) {
    const int64_t at = plan.end;
    if (wanted) plan.end += round_up(bytes, 16);
    return at;
  };
  const int64_t rows = in.sequences.batch * in.sequences.length * in.value_heads * in.keys * T;
  plan.records = take(true, plan.blocks * plan.record_bytes);
  plan.A = take(keeps_A, plan.blocks * tokens * tokens * R);
  plan.total = take(plan.keeps_rows, plan.blocks * in.keys * R);
  plan.q = take(plan.keeps_rows, rows);
  plan.erase = take(plan.keeps_rows, rows);
  plan.k = take(plan.keeps_rows, rows);
  return plan;
}

// The launch: [scores] and the inverse of [solve], a block for each chunk and value head.
void scores(const Inputs& in, void* workspace, const ScoresPlan& plan, Stream stream);

// --- the forward

// Where decays are per key the scores' kernel has multiplied them in: the walk knows decays of tokens only.
constexpr ChunkTile kFwdTiles[] = {
    {DType::kBFloat16, false, 32, 64, 64, 2},  {DType::kBFloat16, false, 32, 128, 64, 2},
    {DType::kBFloat16, false, 32, 256, 32, 2}, {DType::kFloat32, false, 32, 128, 32, 2},
    {DType::kFloat32, false, 16, 256, 32, 2},  {DType::kFloat64, false, 16, 256, 8, 2},
};
constexpr int kFwdKernels = 6;

// The first that holds all keys.
constexpr ChunkTile pick_fwd_tile(const Inputs& in) {
  for (const ChunkTile& tile : kFwdTiles) {
    if (tile.operand == operand_of(in.q.dtype) && tile.keys >= in.keys) return tile;
  }
  return {};
}

// Whether there is room for the keys of the next chunk. There is not with fp64, which no one is in a hurry with.
constexpr bool fetches_ahead(DType operand) {
  return operand != DType::kFloat64;
}

// Shared memory of a block (FwdShared), rounded up.
constexpr int64_t fwd_smem_bytes(const ChunkTile& tile) {
  const int64_t T = size_of(tile.operand), R = size_of(accumulator(tile.operand));
  const int64_t C = tile.tokens, K = tile.keys, V = tile.values;
  return (fetches_ahead(tile.operand) ? 3 : 2) * matrix_bytes(C, K, T) + matrix_bytes(K, V, T) +
         3 * matrix_bytes(C, V, T) + matrix_bytes(C, V, R) + matrix_bytes(C, C, T) + matrix_bytes(C, C, R) +
         2 * (7 * C * R + 16) + K * R + 128;
}

// Compulsory global memory traffic: every tensor once.
constexpr int64_t state_bytes(const Inputs& in, const Array& state) {
  return state ? in.sequences.count * in.value_heads * in.keys * in.size * size_of(state.dtype) : 0;
}
constexpr int64_t input_bytes(const Inputs& in) {
  const Sequences& s = in.sequences;
  return token_bytes(s, in.q, in.heads, in.keys) + token_bytes(s, in.k, in.heads, in.keys) +
         token_bytes(s, in.erase, in.heads, in.keys) + token_bytes(s, in.v, in.value_heads, in.size) +
         token_bytes(s, in.beta, in.value_heads, 1) +
         token_bytes(s, in.decay, in.value_heads, in.form == Decay::kKey ? in.keys : 1) +
         state_bytes(in, in.initial_state) + sequences_bytes(s);
}
constexpr int64_t fwd_bytes(const FwdParams& p) {
  return input_bytes(p) + token_bytes(p.sequences, p.o, p.value_heads, p.size) +
         token_bytes(p.sequences, p.u, p.value_heads, p.size) + state_bytes(p, p.final_state);
}

// Segments that do no more for the segments before them than for their tokens: a product with the (K, K) transition of
// a segment takes about as long as kFoldChunks chunks.
constexpr int64_t kFoldChunks = 8;
constexpr int64_t choose_segments(const Inputs& in, const ChunkTile& tile, int64_t blocks) {
  int64_t segments = seqkern::choose_segments(in.sequences, in.split_time, tile, blocks);
  if (segments == 1) return 1;
  const int64_t chunks = in.sequences.length / row_count(in.sequences) / tile.tokens * in.sequences.batch;
  while (segments > 1 && segments * segments * kFoldChunks > 2 * chunks) --segments;
  return segments;
}

struct FwdPlan {
  ChunkTile tile;
  int64_t rows;         // sequences of cu_seqlens, or batch rows
  int64_t tiles;        // of a head's values
  int64_t transitions;  // columns of the transition of a segment, in whole tiles
  int64_t segments;
  int64_t blocks, smem_bytes;  // of the walk
  ScoresPlan scores;
  int64_t elements;  // in the workspace: of all segments but the last, (row, segment, HV) transition, state from zero
  int64_t workspace_bytes;
  int launches;
  int64_t bytes;
};

// Accumulators of a segment's element.
constexpr int64_t element_numbers(const FwdPlan& plan) {
  return plan.tile.keys * (plan.transitions + plan.tiles * plan.tile.values);
}

// Tests name a number of segments of their own.
constexpr FwdPlan plan_fwd(const FwdParams& p, int64_t segments) {
  FwdPlan plan{.tile = pick_fwd_tile(p),
               .rows = row_count(p.sequences),
               .tiles = 1,
               .transitions = 0,
               .segments = segments,
               .blocks = 0,
               .smem_bytes = 0,
               .scores = {},
               .elements = 0,
               .workspace_bytes = 0,
               .launches = 0,
               .bytes = fwd_bytes(p)};
  if (plan.tile.keys == 0) return plan;
  if (p.size > 0) plan.tiles = ceil_div(p.size, plan.tile.values);
  plan.transitions = round_up(p.keys, plan.tile.values);
  plan.blocks = plan.rows * p.value_heads * plan.tiles;
  plan.smem_bytes = fwd_smem_bytes(plan.tile);
  if (segments == 0) plan.segments = choose_segments(p, plan.tile, plan.blocks);
  plan.scores = plan_scores(p, plan.tile.tokens, 0, false, true);
  plan.elements = plan.scores.end;
  plan.workspace_bytes =
      plan.elements + plan.rows * (plan.segments - 1) * p.value_heads * element_numbers(plan) * size_of(p.accumulator);
  plan.launches = plan.segments > 1 ? 3 : 2;
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

}  // namespace seqkern::delta_rule::cuda

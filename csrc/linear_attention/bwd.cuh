// What the walks of the backward share: which block this is, chunks, gates, and loads of tiles.
#pragma once

#include "common/launch.h"
#include "common/matmul_sums.cuh"
#include "linear_attention/chunk.cuh"
#include "linear_attention/tile_bwd.h"

namespace seqkern::linear_attention::cuda {

enum BwdPass { kSummarize, kWalk };

// After the walk: adds up what blocks share.
void bwd_reduce(const BwdParams& p, const BwdPlan& plan, Stream stream);

// --- which tokens

// The part of a row and of a head that a block walks over.
struct Place {
  int64_t walk, tile, segment;  // walk: of plan.rows x segments x tiles
  int64_t h, hv;
  Span span;  // the sequence; with seq_idx the whole batch row
  Stretch stretch;

  template <int kTokens>
  __device__ __forceinline__ static Place of_block(const BwdParams& p, const BwdPlan& plan) {
    const auto [walk, hv] = divide(blockIdx.x, p.value_heads);
    const auto [part, tile] = divide(walk, plan.tiles);
    const auto [row, segment] = divide(part, plan.segments);
    const int64_t group = divide(p.value_heads, p.heads).quotient;
    const Sequences& s = p.sequences;
    Place place{};
    place.walk = walk, place.tile = tile, place.segment = segment;
    place.h = divide(hv, group).quotient, place.hv = hv;
    place.span = {0, s.length, row, false};
    if (s.cu_seqlens) place.span = packed_span(s, row);
    place.stretch = stretch_of<kTokens>(s, row, segment, plan.segments);
    return place;
  }

  // Index of a token and value head in (B, L, HV).
  __device__ __forceinline__ int64_t token(const BwdParams& p, int64_t tau) const {
    return (stretch.b * p.sequences.length + memory_place(p.sequences, tau)) * p.value_heads + hv;
  }
  __device__ __forceinline__ bool is_first(const Sequences& s, const Chunk& chunk) const {
    return s.seq_idx ? chunk.starts : chunk.begin == span.begin;
  }
  __device__ __forceinline__ bool is_last(const Sequences& s, const Chunk& chunk) const {
    const int64_t end = chunk.begin + chunk.count;
    if (!s.seq_idx || end == s.length) return end == span.end;
    return sequence_id(s, stretch.b, end) != sequence_id(s, stretch.b, end - 1);
  }
};

// The first token of the same id as those before `end`. All lanes take part.
__device__ __forceinline__ int64_t run_begin(const Sequences& s, int64_t b, int64_t end, int32_t id) {
  for (;; end -= kWarpSize) {
    const int64_t at = end - 1 - threadIdx.x % kWarpSize;
    const uint32_t others = ~__ballot_sync(0xffffffffu, at >= 0 && sequence_id(s, b, at) == id);
    if (others != 0) return end - (__ffs(others) - 1);
  }
}

// The chunk that ends at `end`, where `later` is the one after it. Chunks count from the beginning of each sequence.
template <int kTokens>
__device__ __forceinline__ Chunk chunk_before(const Sequences& s, const Place& place, int64_t end, const Chunk& later) {
  const auto rest = [](int64_t length) { return static_cast<int>((length - 1) % kTokens) + 1; };
  if (!s.seq_idx) {
    const int count = rest(end - place.stretch.begin);
    return {end - count, count, false, false};
  }
  const int64_t b = place.stretch.b;
  const int32_t id = sequence_id(s, b, end - 1);
  const bool last = end == s.length || later.starts;
  const int count = last ? rest(end - run_begin(s, b, end, id)) : kTokens;
  return {end - count, count, end == count || sequence_id(s, b, end - count - 1) != id, id < 0};
}

// --- rows of tensors

// Columns that a thread loads at once.
template <typename T>
inline constexpr int kColumnsAtOnce = sizeof(T) == 2 ? 8 : 4;

template <int kAtOnce, typename R, typename X>
__device__ __forceinline__ void read_elements(const X* from, int valid, R (&to_values)[kAtOnce]) {
  const bool whole = valid >= kAtOnce && reinterpret_cast<uintptr_t>(from) % alignof(Vector<X, kAtOnce>) == 0;
  Vector<X, kAtOnce> x;
  if (whole) {
    x = load<kAtOnce>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) x[i] = i < valid ? load(from + i) : to<X>(0.0f);
  }
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) to_values[i] = to<R>(x[i]);
}
template <int kAtOnce, typename R, typename X>
__device__ __forceinline__ void write_elements(X* to_memory, int valid, const R (&values)[kAtOnce]) {
  Vector<X, kAtOnce> x;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) x[i] = to<X>(values[i]);
  const bool whole = valid >= kAtOnce && reinterpret_cast<uintptr_t>(to_memory) % alignof(Vector<X, kAtOnce>) == 0;
  store(to_memory, x, whole ? kAtOnce : min(valid, kAtOnce - 1));
  if (!whole && valid >= kAtOnce) store(to_memory + kAtOnce - 1, x[kAtOnce - 1]);
}

// A row of an operand in shared memory.
template <typename T, int kAtOnce, typename R>
__device__ __forceinline__ void put(T* row, const R (&values)[kAtOnce]) {
  Vector<T, kAtOnce> x;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) x[i] = to<T>(values[i]);
  *reinterpret_cast<Vector<T, kAtOnce>*>(row) = x;
}

}  // namespace seqkern::linear_attention::cuda

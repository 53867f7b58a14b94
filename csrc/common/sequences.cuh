// Sequences as the device finds them, without help from the host.
//
// Kernels count in processing time: tau = t, or L - 1 - t with `reverse`, so that the past of a token is always at
// smaller tau. Values of cu_seqlens are clamped: whatever they hold, spans stay inside the row.
#pragma once

#include "common/grid.cuh"
#include "common/load.cuh"
#include "common/sequences.h"

namespace seqkern {

// A stretch of one batch row in processing time: a sequence, or padding.
struct Span {
  int64_t begin, end;
  int64_t state;  // row of the states that this sequence may own
  bool padding;
};

__device__ __forceinline__ int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// Place in memory of a token, or of the last of `count` tokens where time runs backwards.
__device__ __forceinline__ int64_t memory_place(const Sequences& s, int64_t tau, int64_t count = 1) {
  return s.reverse ? s.length - count - tau : tau;
}

// Id of a token, all padding being -1.
__device__ __forceinline__ int32_t sequence_id(const Sequences& s, int64_t b, int64_t tau) {
  return max(load(s.seq_idx + b * s.length + memory_place(s, tau)), -1);
}

__device__ __forceinline__ int64_t sequence_start(const Sequences& s, int64_t n) {
  const int64_t start = s.cu_seqlens_is_int64 ? load(static_cast<const int64_t*>(s.cu_seqlens) + n)
                                              : load(static_cast<const int32_t*>(s.cu_seqlens) + n);
  return clamp(start, 0, s.length);
}

// Sequence n of cu_seqlens.
__device__ __forceinline__ Span packed_span(const Sequences& s, int64_t n) {
  const int64_t begin = sequence_start(s, n), end = max(begin, sequence_start(s, n + 1));
  if (s.reverse) return {s.length - end, s.length - begin, n, false};
  return {begin, end, n, false};
}

// The sequence of cu_seqlens that holds tau; a token that bad values leave to no sequence is padding.
__device__ __forceinline__ Span packed_span_at(const Sequences& s, int64_t tau) {
  const int64_t t = memory_place(s, tau);
  int64_t low = 0, high = s.count;  // sequences before `low` start at or before t, those from `high` on after it
#pragma unroll 1
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sequence_start(s, middle) <= t)
      low = middle + 1;
    else
      high = middle;
  }
  if (low > 0) {
    const Span span = packed_span(s, low - 1);
    if (span.begin <= tau && tau < span.end) return span;
  }
  return {tau, tau + 1, 0, true};
}

// The span of tau in row b. With seq_idx only tokens in [tau - before, tau + after] are looked at: an end of the span
// that lies farther away is reported as the nearest token not looked at.
__device__ __forceinline__ Span span_at(const Sequences& s, int64_t b, int64_t tau, int64_t before, int64_t after) {
  if (s.cu_seqlens) return packed_span_at(s, tau);
  if (!s.seq_idx) return {0, s.length, b, false};
  const int32_t id = sequence_id(s, b, tau);
  const int64_t low = max(tau - before, int64_t{0}), high = min(tau + after + 1, s.length);
  int64_t begin = tau, end = tau + 1;
#pragma unroll 1
  while (begin > low && sequence_id(s, b, begin - 1) == id) --begin;
#pragma unroll 1
  while (end < high && sequence_id(s, b, end) == id) ++end;
  return {begin, end, b, id < 0};
}

// The same for a tau in [first, first + kCount), looking at these tokens only, all at once.
template <int kCount>
__device__ __forceinline__ Span span_in_window(const Sequences& s, int64_t b, int64_t tau, int64_t first) {
  static_assert(kCount < 32, "one bit per token");
  if (!s.seq_idx) return span_at(s, b, tau, 0, 0);
  const int64_t lowest = memory_place(s, first, kCount);
  const int32_t* ids = s.seq_idx + b * s.length + lowest;
  const int at = static_cast<int>(memory_place(s, tau) - lowest);
  const int low = static_cast<int>(clamp(-lowest, 0, kCount)),
            high = static_cast<int>(clamp(s.length - lowest, 0, kCount));
  const int32_t id = max(load(ids + at), -1);
  uint32_t differs = 1u << kCount;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < low || i >= high || max(load(ids + i), -1) != id) differs |= 1u << i;
  }
  const uint32_t below = (1u << at) - 1;
  const int begin = 32 - __clz(differs & below), end = __ffs(differs & ~below) - 1;
  if (s.reverse) return {first + kCount - end, first + kCount - begin, b, id < 0};
  return {first + begin, first + end, b, id < 0};
}

// Whether tokens [begin, end) of row b are all padding; the end where a sequence is near is looked at first.
__device__ __forceinline__ bool all_padding(const Sequences& s, int64_t b, int64_t begin, int64_t end, bool near_end) {
  constexpr int kAtOnce = 8;  // loads in flight
  int64_t low = memory_place(s, begin, end - begin), high = low + end - begin;
#pragma unroll 1
  while (low < high) {
    const int count = static_cast<int>(min(high - low, int64_t{kAtOnce}));
    const bool from_high = near_end != s.reverse;
    const int32_t* ids = s.seq_idx + b * s.length + (from_high ? high - count : low);
    int32_t largest = -1;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (i < count) largest = max(largest, load(ids + i));
    }
    if (largest >= 0) return false;
    from_high ? high -= count : low += count;
  }
  return true;
}

// Row of the initial state that enters a span, -1: none. span.begin is the true one.
__device__ __forceinline__ int64_t initial_row(const Sequences& s, int64_t b, const Span& span) {
  if (span.padding || (s.seq_idx && !all_padding(s, b, 0, span.begin, true))) return -1;
  return span.state;
}

// Row of the final state that follows a span, -1: none. span.end is the true one.
__device__ __forceinline__ int64_t final_row(const Sequences& s, int64_t b, const Span& span) {
  if (span.padding || (s.seq_idx && !all_padding(s, b, span.end, s.length, false))) return -1;
  return span.state;
}

// The sequence that owns the initial state (first) or the final state (last) of row `state`; empty if there is none.
// With seq_idx its other end is looked for within `reach` tokens.
__device__ __forceinline__ Span span_of_state(const Sequences& s, int64_t state, bool first, int64_t reach) {
  if (s.cu_seqlens) return packed_span(s, state);
  if (!s.seq_idx) return {0, s.length, state, false};
  int64_t padding = 0;
#pragma unroll 1
  while (padding < s.length && sequence_id(s, state, first ? padding : s.length - 1 - padding) < 0) ++padding;
  if (padding == s.length) return {0, 0, state, false};
  const int64_t tau = first ? padding : s.length - 1 - padding;
  return first ? span_at(s, state, tau, 0, reach) : span_at(s, state, tau, reach, 0);
}

// Of the StepParams of any operator: the row of the state pool that batch row b owns, negative: none.
template <typename Params>
__device__ __forceinline__ int64_t state_row(const Params& p, int64_t b) {
  if (!p.state_indices) return b;
  const int64_t row = p.state_indices_is_int64 ? load(static_cast<const int64_t*>(p.state_indices) + b)
                                               : load(static_cast<const int32_t*>(p.state_indices) + b);
  return row < p.rows ? row : -1;
}

}  // namespace seqkern

// How the CPU kernels cut the work, and the memory that they need. Pure functions of the call and of the number of
// threads.
//
// A unit of work is a run and a value head, or a part of that head's values: columns of its state, which know nothing
// of each other. Where units are fewer than threads, values are parted first, which changes no result, and then time is
// cut into segments, if the call allows it: segments run side by side, and what enters each follows from those before.
#pragma once
#include "common/chunk_plan.h"
#include "linear_attention/params.h"

namespace seqkern::linear_attention {
namespace {  // kernels are compiled once per instruction set, which must share no code

constexpr int64_t kShortestSegment = 4 * 64;  // tokens

// Tokens of a segment, whole chunks, where there are so many units of work; 0: time is not cut.
inline int64_t segment_tokens(const Inputs& in, int64_t units) {
  const int64_t wanted = num_threads() / at_least(1, units);
  if (!in.split_time || wanted < 2) return 0;
  const int64_t longest = longest_run(in);
  const int64_t tokens = at_least(kShortestSegment, round_up(ceil_div(longest, wanted), kChunk));
  return tokens < longest ? tokens : 0;
}
inline int64_t segment_tokens(const Inputs& in) {
  return segment_tokens(in, in.num_runs * in.value_heads * parts_of_head(in));
}
constexpr int64_t segments_of_run(const Run& run, int64_t tokens) {
  return tokens == 0 || run.padding ? 1 : at_least(1, ceil_div(run.end - run.begin, tokens));
}
inline int64_t num_segments(const Inputs& in, int64_t tokens) {
  int64_t count = 0;
  for (int64_t r = 0; r < in.num_runs; ++r) count += segments_of_run(in.runs[r], tokens);
  return count;
}
inline int64_t num_segments(const Inputs& in) {
  return num_segments(in, segment_tokens(in));
}

// Of each segment of each unit, where time is cut: first what its tokens leave of an empty state and how they decay any
// other, then the state that enters it. S (K, values of a part), z (K), decay (K, or 1), m and sum of f, in rows
// of whole vectors for every instruction set.
inline int64_t elements_of_segment(const Inputs& in) {
  return in.keys * values_of_part(in) + 2 * round_up(in.keys, kWidestVector) + kWidestVector;
}

inline int64_t cpu_fwd_workspace_bytes(const FwdParams& p) {
  if (segment_tokens(p) == 0) return 0;
  return num_segments(p) * p.value_heads * parts_of_head(p) * elements_of_segment(p) * size_of(p.accumulator);
}

// ---- backward

constexpr int64_t kHeadNumbers = 3;  // sums over time of a value head: dA, dbias, ddecay

// Time, as in the forward.
inline int64_t bwd_segment_tokens(const Inputs& in) {
  return segment_tokens(in, in.num_runs * in.heads * parts_of_group(in));
}

// The workspace, in accumulators.
struct BwdWorkspace {
  int64_t keys;      // (parts, 2, B L, H, K): dq and dk, where there are several parts
  int64_t heads;     // (segments, HV, of_head): sums over time
  int64_t bonus;     // (segments, H, parts, K): dbonus
  int64_t elements;  // (segments, HV, of_element), where time is cut: see Element
  int64_t of_head, of_state, of_element;

  explicit BwdWorkspace(const Inputs& in) {
    const int64_t parts = parts_of_group(in), segments = num_segments(in, bwd_segment_tokens(in));
    const int64_t key_row = round_up(in.keys, kWidestVector);
    of_head = kHeadNumbers + (!in.skip ? 0 : in.skip_v == 0 ? 1 : in.size);
    of_state = round_up(in.size + 1, kWidestVector) * key_row;
    of_element = 2 * of_state + key_row + kWidestVector;
    keys = parts == 1 ? 0 : parts * 2 * in.sequences.batch * in.sequences.length * in.heads * in.keys;
    heads = segments * in.value_heads * of_head;
    bonus = in.bonus ? segments * in.heads * parts * in.keys : 0;
    elements = bwd_segment_tokens(in) == 0 ? 0 : segments * in.value_heads * of_element;
  }
};
inline int64_t cpu_bwd_workspace_bytes(const BwdParams& p) {
  const BwdWorkspace w(p);
  return (w.keys + w.heads + w.bonus + w.elements) * size_of(p.accumulator);
}

}  // namespace
}  // namespace seqkern::linear_attention

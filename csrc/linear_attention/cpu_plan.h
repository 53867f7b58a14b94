// How the CPU kernels cut the work, and the memory that they need. Pure functions of the call and of the number of
// threads.
//
// A unit of work is a run and a value head, or a part of that head's values: columns of its state, which know nothing
// of each other. Where units are fewer than threads, values are parted first, which changes no result, and then time is
// cut into segments, if the call allows it: segments run side by side, and what enters each follows from those before.
#pragma once
#include "common/parallel.h"
#include "linear_attention/params.h"

namespace seqkern::linear_attention {
namespace {  // kernels are compiled once per instruction set, which must share no code

constexpr int64_t at_most(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t at_least(int64_t a, int64_t b) {
  return a > b ? a : b;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

constexpr int64_t kChunk = 64;            // tokens, counted from the start of each run in the order of time
constexpr int64_t kSubChunk = 16;         // of a chunk, where decays are per key
constexpr int64_t kStateBytes = 1 << 20;  // of the states that a thread works on: they stay in its second-level cache
constexpr int64_t kPart = 64;             // values: parts are multiples
constexpr int64_t kShortestSegment = 4 * 64;  // tokens

constexpr int64_t longest_run(const Inputs& in) {
  int64_t longest = 0;
  for (int64_t r = 0; r < in.num_runs; ++r) longest = at_least(longest, in.runs[r].end - in.runs[r].begin);
  return longest;
}

// Values of a part.
inline int64_t values_of_part(const Inputs& in) {
  const int64_t fitting = kStateBytes / at_least(1, in.keys * size_of(in.accumulator));
  const int64_t wanted = num_threads() / at_least(1, in.num_runs * in.value_heads);
  const int64_t values = at_most(at_most(fitting, in.size), ceil_div(in.size, at_least(1, wanted)));
  return at_least(kPart, round_up(values, kPart));
}
inline int64_t parts_of_head(const Inputs& in) {
  return at_least(1, ceil_div(in.size, values_of_part(in)));
}

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
constexpr int64_t kWidestVector = 16;
inline int64_t elements_of_segment(const Inputs& in) {
  return in.keys * values_of_part(in) + 2 * round_up(in.keys, kWidestVector) + kWidestVector;
}

inline int64_t cpu_fwd_workspace_bytes(const FwdParams& p) {
  if (segment_tokens(p) == 0) return 0;
  return num_segments(p) * p.value_heads * parts_of_head(p) * elements_of_segment(p) * size_of(p.accumulator);
}

// ---- backward

constexpr int64_t kHeadsOfPart = 6;       // value heads of one key head that a thread takes through time at once
constexpr int64_t kKeptBytes = 16 << 20;  // of states that a thread keeps from its walk forward for the one backward
constexpr int64_t kLargeBytes = 4 << 20;  // beyond a second-level cache
constexpr int64_t kNumbersOfThread = 1 << 14;
constexpr int64_t kHeadNumbers = 3;  // sums over time of a value head: dA, dbias, ddecay

constexpr int64_t heads_of_group(const Inputs& in) {
  return in.value_heads / at_least(1, in.heads);
}

// The value heads of a key head are cut into parts, whose dq and dk are summed in order. More threads than needed make
// more parts only where they may cut time as well.
inline int64_t parts_of_group(const Inputs& in) {
  const int64_t threads = in.split_time ? num_threads() / at_least(1, in.num_runs * in.heads) : 1;
  return at_least(at_least(1, ceil_div(heads_of_group(in), kHeadsOfPart)), at_most(threads, heads_of_group(in)));
}
inline int64_t most_heads_of_part(const Inputs& in) {
  return ceil_div(heads_of_group(in), parts_of_group(in));
}

// Time, as in the forward.
inline int64_t bwd_segment_tokens(const Inputs& in) {
  return segment_tokens(in, in.num_runs * in.heads * parts_of_group(in));
}

// States before as many chunks as this are kept at once. Of a longer run only those before each such stretch are, and
// the stretch is walked through once more.
inline int64_t chunks_of_stretch(const Inputs& in) {
  const int64_t bytes = most_heads_of_part(in) * in.keys * in.size * size_of(in.accumulator);
  return at_least(8, kKeptBytes / at_least(1, bytes));
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

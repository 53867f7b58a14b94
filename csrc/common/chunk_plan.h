// How CPU kernels that take time in chunks cut the rest of the work: pure functions of the call and of the number of
// threads. `Inputs` is a call's, with sequences by runs, value heads, keys (K) and size (V).
#pragma once
#include "common/dtype.h"
#include "common/parallel.h"
#include "common/sequences.h"
#include "common/sizes.h"

namespace seqkern {
namespace {

constexpr int64_t kChunk = 64;            // tokens, counted from the start of each run in the order of time
constexpr int64_t kSubChunk = 16;         // of a chunk, where decays are per key
constexpr int64_t kWidestVector = 16;     // numbers, of any instruction set: the workspace does not depend on it
constexpr int64_t kStateBytes = 1 << 20;  // of the states that a thread works on: they stay in its second-level cache
constexpr int64_t kPart = 64;             // values: parts are multiples

template <class Inputs>
constexpr int64_t longest_run(const Inputs& in) {
  int64_t longest = 0;
  for (int64_t r = 0; r < in.num_runs; ++r) longest = at_least(longest, in.runs[r].end - in.runs[r].begin);
  return longest;
}

// Values of a part of a head: columns of its state, which know nothing of each other, so that parts change no result.
template <class Inputs>
inline int64_t values_of_part(const Inputs& in) {
  const int64_t fitting = kStateBytes / at_least(1, in.keys * size_of(in.accumulator));
  const int64_t wanted = num_threads() / at_least(1, in.num_runs * in.value_heads);
  const int64_t values = at_most(at_most(fitting, in.size), ceil_div(in.size, at_least(1, wanted)));
  return at_least(kPart, round_up(values, kPart));
}
template <class Inputs>
inline int64_t parts_of_head(const Inputs& in) {
  return at_least(1, ceil_div(in.size, values_of_part(in)));
}

// ---- backward

constexpr int64_t kHeadsOfPart = 6;       // value heads of one key head that a thread takes through time at once
constexpr int64_t kKeptBytes = 16 << 20;  // of states that a thread keeps from its walk forward for the one backward
constexpr int64_t kLargeBytes = 4 << 20;  // beyond a second-level cache
constexpr int64_t kNumbersOfThread = 1 << 14;

template <class Inputs>
constexpr int64_t heads_of_group(const Inputs& in) {
  return in.value_heads / at_least(1, in.heads);
}

// The value heads of a key head are cut into parts, whose dq and dk are summed in order. More threads than needed make
// more parts only where they may cut time as well.
template <class Inputs>
inline int64_t parts_of_group(const Inputs& in) {
  const int64_t threads = in.split_time ? num_threads() / at_least(1, in.num_runs * in.heads) : 1;
  return at_least(at_least(1, ceil_div(heads_of_group(in), kHeadsOfPart)), at_most(threads, heads_of_group(in)));
}
template <class Inputs>
inline int64_t most_heads_of_part(const Inputs& in) {
  return ceil_div(heads_of_group(in), parts_of_group(in));
}

// States before as many chunks as this are kept at once.
template <class Inputs>
inline int64_t chunks_of_stretch(const Inputs& in) {
  const int64_t bytes = most_heads_of_part(in) * in.keys * in.size * size_of(in.accumulator);
  return at_least(8, kKeptBytes / at_least(1, bytes));
}

}  // namespace
}  // namespace seqkern

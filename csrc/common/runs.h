// How runs, and blocks of their channels, are shared out to the threads of a CPU kernel. Inputs have sequences, runs
// and num_runs.
#pragma once
#include "common/parallel.h"
#include "common/sequences.h"
#include "common/sizes.h"

namespace seqkern {
namespace {

template <class Inputs>
constexpr int64_t longest_run(const Inputs& in) {
  int64_t longest = 0;
  for (int64_t r = 0; r < in.num_runs; ++r) longest = at_least(longest, in.runs[r].end - in.runs[r].begin);
  return longest;
}

// The first run that begins at or after a position in (B, L).
template <class Inputs>
inline int64_t first_run(const Inputs& in, int64_t position) {
  const int64_t B_L = in.sequences.batch * in.sequences.length;
  int64_t low = 0, high = in.num_runs;
  if (position <= 0) return low;
  if (position >= B_L) return high;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const Run& run = in.runs[middle];
    if (at_most(run.b * in.sequences.length + run.begin, B_L - 1) < position)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Calls body(r, block, workspace) for every run r and block; a thread makes its workspace by make(). Positions in all
// blocks one after another are shared out, at least `grain` to a thread; a run belongs to whom its first token belongs.
template <class Inputs, class Make, class Body>
inline void for_all_runs(const Inputs& in, int64_t blocks, int64_t grain, const Make& make, const Body& body) {
  const int64_t tokens = at_least(1, in.sequences.batch * in.sequences.length);
  parallel_for(0, blocks * tokens, grain, [&](int64_t begin, int64_t end) {
    auto workspace = make();
    for (int64_t block = begin / tokens; block * tokens < end; ++block) {
      const int64_t last = first_run(in, end - block * tokens);
      for (int64_t r = first_run(in, begin - block * tokens); r < last; ++r) body(r, block, workspace);
    }
  });
}

}  // namespace
}  // namespace seqkern

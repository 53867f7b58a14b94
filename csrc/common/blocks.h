// How the units of work of a CPU kernel, (runs, value heads, parts of a head's values), are shared out to threads.
#pragma once
#include "common/chunk_plan.h"

namespace seqkern {
namespace {

// Value heads that a thread takes through time together, all values of each, or a part of one head's. What a chunk's q
// and k give by themselves, such as their products, is computed once for all heads of a block that share them; and
// heads lie side by side in memory, so longer rows are read.
struct Block {
  const Run* run;
  int64_t head, heads;    // value heads [head, head + heads)
  int64_t value, values;  // values [value, value + values) of each
};

// Inputs: as for common/chunk_plan.h.
template <class Inputs>
struct Blocks {
  const Inputs& in;
  const int64_t part = values_of_part(in), parts = parts_of_head(in), units = in.value_heads * parts;  // of a run
  const int64_t max_values = at_most(part, in.size);
  const int64_t max_heads;

  // `joined`: whether a block may have several heads.
  explicit Blocks(const Inputs& inputs, bool joined = true) : in(inputs), max_heads(joined ? heads_of_block() : 1) {}

  int64_t heads_of_block() const {
    const int64_t bytes = in.keys * round_up(max_values, kWidestVector) * size_of(in.accumulator);
    return parts > 1 ? 1 : at_least(1, at_most(in.value_heads, kStateBytes / at_least(1, bytes)));
  }

  // Calls body(block, workspace) for all of them; a thread makes its workspace from `call`. Tokens of all units one
  // after another are shared out; a unit belongs to whom its first token belongs.
  template <class Workspace, class Call, class Body>
  void for_all(const Call& call, const Body& body) const {
    const auto cost = [](const Run& run) { return run.end - run.begin + kSubChunk; };  // states are moved, too
    int64_t total = 0;
    for (int64_t r = 0; r < in.num_runs; ++r) total += cost(in.runs[r]) * units;
    const int64_t work = (in.keys + kChunk) * max_values;
    parallel_for(0, total, kGrain / at_least(1, work) + 1, [&](int64_t begin, int64_t end) {
      const Workspace workspace(call);
      for (int64_t r = 0; r < in.num_runs; ++r) {
        const int64_t each = cost(in.runs[r]);
        const int64_t first = at_most(ceil_div(at_least(begin, 0), each), units);
        const int64_t last = at_most(ceil_div(at_least(end, 0), each), units);
        for_each(in.runs[r], first, last, [&](const Block& block) { body(block, workspace); });
        begin -= each * units, end -= each * units;
      }
    });
  }

  // Calls body(block) for units [begin, end) of (HV, parts), merged into blocks.
  template <class Body>
  void for_each(const Run& run, int64_t begin, int64_t end, const Body& body) const {
    while (begin < end) {
      const int64_t heads = at_most(end - begin, max_heads), value = begin % parts * part;
      body(Block{&run, begin / parts, heads, value, at_most(part, in.size - value)});
      begin += heads;
    }
  }

  static constexpr int64_t kGrain = 1 << 18;  // products worth another thread
};

}  // namespace
}  // namespace seqkern

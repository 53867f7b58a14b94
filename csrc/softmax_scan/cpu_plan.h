// How the CPU kernels cut the work. Pure functions of the call. Time is never cut, and no value depends on the cut.
#pragma once
#include "softmax_scan/params.h"

namespace seqkern::softmax_scan {
namespace {  // kernels are compiled once per instruction set, which must share no code

constexpr int64_t at_most(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t at_least(int64_t a, int64_t b) {
  return a > b ? a : b;
}

constexpr int64_t kChunk = 32;        // tokens
constexpr int64_t kPart = 32;         // values of a head, which the forward may give to a thread of their own
constexpr int64_t kGrain = 1 << 14;   // values worth another thread
constexpr int64_t kMaxValues = 4096;  // of several heads: their state stays in the first-level cache

// Heads of a run, all values of each, or values of one head: what a thread takes through time at once.
struct Block {
  const Run* run;
  int64_t head, heads;    // heads [head, head + heads)
  int64_t value, values;  // values [value, value + values) of each
};

constexpr int64_t heads_of_block(const Inputs& in, int64_t max_heads) {
  return at_least(1, at_most(at_most(max_heads, in.heads), kMaxValues / at_least(1, in.size)));
}

// Calls body(block) for the units [begin, end) of (runs, H, parts of a head), merged into blocks.
template <class Body>
constexpr void for_each_block(const Inputs& in, int64_t parts, int64_t max_heads, int64_t begin, int64_t end,
                              const Body& body) {
  const int64_t fitting = heads_of_block(in, max_heads);
  while (begin < end) {
    const int64_t part = begin % parts, head = begin / parts % in.heads;
    const Run* const run = in.runs + begin / parts / in.heads;
    int64_t units = at_most(parts - part, end - begin);
    if (units == parts) {
      const int64_t heads = at_most((end - begin) / parts, at_most(fitting, in.heads - head));
      body(Block{run, head, heads, 0, in.size});
      units = heads * parts;
    } else {
      const int64_t value = part * kPart;
      body(Block{run, head, 1, value, at_most(in.size - value, units * kPart)});
    }
    begin += units;
  }
}

constexpr int64_t cpu_fwd_workspace_bytes(const FwdParams&) {
  return 0;
}
constexpr int64_t cpu_bwd_workspace_bytes(const BwdParams&) {
  return 0;
}

}  // namespace
}  // namespace seqkern::softmax_scan

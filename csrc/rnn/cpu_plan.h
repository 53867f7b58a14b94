// How the CPU kernels cut the work: a pure function of the call and of the number of threads. They allocate the memory
// that they need themselves.
//
// Runs go through time in tiles of rows, the longest first. What a token costs is its share of reading the weights of a
// head, which stay in a second-level cache if they are few. So either
//   apart     every thread takes tiles of rows of a head for itself, with all weights, and never waits; or
//   together  a team of threads takes one tile, all heads at once, each thread with a part of the units and their
//             weights, and waits for the others at every token.
// No result depends on it: the sums of a row know nothing of other rows, and those of a unit nothing of other units.
#pragma once
#include "common/sizes.h"
#include "rnn/params.h"

namespace seqkern::rnn {
namespace {  // kernels are compiled once per instruction set, which must share no code

struct CpuPlan {
  int64_t rows;     // of a tile, at most
  int64_t at_once;  // tiles of a head that runs are dealt to in turn, so that they take equally long
  int64_t team;     // threads that take a tile together; 1: apart
};

constexpr int64_t kMostRows = 64;           // their operands stay in the second-level cache, beside a strip of weights
constexpr int64_t kCachedBytes = 3 << 19;   // weights that do as well
constexpr int64_t kFewRows = 4;             // that weights are read for as fast as they are multiplied
constexpr int64_t kFewBytes = 1 << 16;      // weights that are read as fast as a team meets
constexpr int64_t kMemberBytes = 1 << 17;   // weights worth another member of a team
constexpr int64_t kWorkOfMember = 1 << 19;  // multiplications of a token worth another member
constexpr int64_t kWorkOfThread = 1 << 19;  // multiplications worth another thread

constexpr int64_t greatest_divisor(int64_t a, int64_t b) {
  return b == 0 ? a : greatest_divisor(b, a % b);
}
// Rows of tiles that are equally large, at most kMostRows.
constexpr int64_t rows_of_tile(int64_t rows) {
  return ceil_div(rows, ceil_div(rows, kMostRows));
}

// `operand`: bytes of a number of the weights as they are multiplied.
constexpr CpuPlan cpu_plan(const Inputs& in, int64_t operand, int64_t threads) {
  const int64_t gates = in.sizes().gates * in.units, tokens = in.sequences.batch * in.sequences.length;
  const int64_t weights = (gates + (in.projects() ? in.units : 0)) * in.outputs, bytes = weights * operand;
  const int64_t runs = at_least(1, in.num_runs), heads = at_least(1, in.heads);
  threads = at_least(1, at_most(threads, tokens * heads * weights / kWorkOfThread));
  // The fewest tiles of a head that give every thread as many as the others.
  const int64_t at_once = at_most(threads / greatest_divisor(heads, threads), runs);
  if (heads >= (at_once == 1 ? 1 : 4) * threads) {
    // Together a token is read as it lies, with all its heads.
    const bool worth = heads > 1 && rows_of_tile(runs) * heads * weights >= kWorkOfMember * threads;
    return {rows_of_tile(runs), 1, worth && heads * bytes <= kCachedBytes * threads ? threads : 1};
  }
  const int64_t rows = ceil_div(runs, at_once), team = at_most(threads, heads * bytes / kMemberBytes);
  const bool apart = heads * at_once >= threads && bytes <= kCachedBytes && (rows >= kFewRows || bytes <= kFewBytes);
  if (apart || team <= 1) return {rows_of_tile(rows), at_once, 1};
  return {rows_of_tile(runs), 1, team};
}

}  // namespace
}  // namespace seqkern::rnn

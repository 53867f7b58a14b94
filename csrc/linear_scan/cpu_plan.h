// How the CPU kernels cut the work, and the memory that they need. Pure functions of the call.
//
// A piece is a run, or a segment of one where time is cut: segments then run side by side, and what enters each follows
// from the affine maps (common/affine.h) of those before it. Cuts are counted from the start of each run and depend on
// sizes only, so results do not depend on threads.
#pragma once
#include "common/runs.h"
#include "linear_scan/params.h"

namespace seqkern::linear_scan {
namespace {  // kernels are compiled once per instruction set, which must share no code

// Elements of a token.
constexpr int64_t row_elements(const Inputs& in) {
  return in.channels * in.parts();
}

// Tokens of a segment.
constexpr int64_t segment_tokens(const Inputs& in) {
  return at_least(256, at_most(4096, (1 << 15) / at_least(1, row_elements(in)) / 64 * 64));
}

// Time is cut where runs and channels alone make less than this many pieces of work of 128 bytes of channels.
constexpr int64_t kFewPieces = 8;

constexpr bool is_cut(const Inputs& in) {
  const int64_t longest = longest_run(in), tokens = in.sequences.batch * in.sequences.length;
  const int64_t columns = ceil_div(row_elements(in) * size_of(in.accumulator), 128);
  return in.split_time && longest >= 2 * segment_tokens(in) && tokens * columns < longest * kFewPieces;
}

constexpr int64_t pieces_of_run(const Inputs& in, const Run& run, bool cut) {
  return cut ? at_least(1, ceil_div(run.end - run.begin, segment_tokens(in))) : 1;
}

constexpr int64_t num_pieces(const Inputs& in) {
  const bool cut = is_cut(in);
  int64_t count = 0;
  for (int64_t r = 0; r < in.num_runs; ++r) count += pieces_of_run(in, in.runs[r], cut);
  return count;
}

// Of each piece, where time is cut: the affine map of its tokens, and what enters it.
constexpr int64_t padded_row(const Inputs& in) {
  return ceil_div(row_elements(in), 32) * 32;  // elements, whole vectors for every instruction set
}
constexpr int64_t elements_of_maps(const Inputs& in) {
  return is_cut(in) ? num_pieces(in) * 3 * padded_row(in) : 0;
}

// [da] is summed over the dimensions where a is constant: first over the tokens of a piece and blocks of this many
// channels, then over pieces or batch rows and blocks, in order.
constexpr int64_t kSumBlock = 64;

struct DecaySums {
  bool batch, time, channels;  // summed over
  int64_t rows, columns;       // of partial sums: pieces or tokens, and elements

  constexpr bool any() const { return batch || time || channels; }
};
constexpr DecaySums decay_sums(const BwdParams& p) {
  DecaySums sums{p.sequences.batch != 1 && p.da.stride.b == 0, p.sequences.length != 1 && p.da.stride.l == 0,
                 p.channels != 1 && p.da.stride.d == 0, 0, 0};
  sums.rows = sums.time ? num_pieces(p) : p.sequences.batch * p.sequences.length;
  sums.columns = sums.channels ? ceil_div(p.channels, kSumBlock) * p.parts() : row_elements(p);
  return sums;
}

constexpr int64_t cpu_fwd_workspace_bytes(const FwdParams& p) {
  return elements_of_maps(p) * size_of(p.accumulator);
}

constexpr int64_t cpu_bwd_workspace_bytes(const BwdParams& p) {
  const DecaySums sums = decay_sums(p);
  const int64_t partials = p.da && sums.any() ? sums.rows * sums.columns : 0;
  return (elements_of_maps(p) + partials) * size_of(p.accumulator);
}

}  // namespace
}  // namespace seqkern::linear_scan

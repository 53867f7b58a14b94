// Pure functions of shape and dtype: how the work is cut and what it needs. Callable without a GPU.
#pragma once
#include "causal_conv1d/params.h"

namespace seqkern::causal_conv1d {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Weight gradients are summed over tokens in chunks of this many, counted in memory from token 0 of each batch row,
// and then over the chunks in order: the result does not depend on threads, blocks or the device's size.
constexpr int64_t kTimeChunk = 4096;

constexpr int64_t time_chunks(const Inputs& in) { return ceil_div(in.sequences.length, kTimeChunk); }

// Partial sums of dweight and dbias: (B, chunks, W + 1, D) accumulators, the last row of W + 1 for the bias.
constexpr int64_t partials_bytes(const Inputs& in) {
  return in.sequences.batch * time_chunks(in) * (in.width + 1) * in.channels * size_of(accumulator(in.dtype));
}

}  // namespace seqkern::causal_conv1d

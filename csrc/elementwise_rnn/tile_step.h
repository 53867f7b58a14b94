// How a step is cut on a GPU. Pure functions of shape; see tile.h.
#pragma once
#include "common/sizes.h"
#include "elementwise_rnn/params.h"

namespace seqkern::elementwise_rnn::cuda {

struct StepTile {
  int threads, blocks_per_sm;
};
constexpr StepTile kStepTile = {.threads = 128, .blocks_per_sm = 8};

struct StepPlan {
  StepTile tile;
  int64_t blocks;
};

constexpr StepPlan plan_step(const StepParams& p) {
  return {.tile = kStepTile, .blocks = ceil_div(p.batch * p.channels, kStepTile.threads)};
}

// Compulsory global memory traffic: every tensor once, states in and out.
constexpr int64_t step_bytes(const StepParams& p) {
  const CellSizes sizes = sizes_of(p.cell);
  int64_t of_channel = sizes.gates * size_of(p.x.dtype) + size_of(p.h.dtype);
  for (int i = 0; i < sizes.published; ++i) of_channel += 2 * size_of(p.state[i].dtype);
  return p.batch * p.channels * of_channel + sizes.weights * p.channels * size_of(p.weights.dtype);
}

constexpr int kStepKernels = 2 * kCells;  // fp32 and fp64

}  // namespace seqkern::elementwise_rnn::cuda

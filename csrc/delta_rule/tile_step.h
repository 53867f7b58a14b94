// How a step is cut on a GPU and what it needs.
#pragma once
#include "common/state_step.h"
#include "delta_rule/params.h"
#include "delta_rule/tile.h"

namespace seqkern::delta_rule::cuda {

constexpr int kStepThreads = 128;  // of a block, at most
constexpr int kStepValues = 4;     // of a thread, at most

// A thread holds all its keys in registers.
constexpr int step_blocks_per_sm(DType accumulator) {
  return accumulator == DType::kFloat64 ? 3 : 6;
}

struct StepPlan {
  StateCut cut;
  int tiles;  // blocks of a head
  int blocks_per_sm;
  int64_t blocks, smem_bytes;
};

constexpr StepPlan plan_step(const StepParams& p) {
  StepPlan plan{};
  plan.cut = cut_state(p.keys, p.size, p.S.i < p.S_v, p.accumulator, kStepThreads);
  plan.tiles = static_cast<int>(ceil_div(p.size, plan.cut.width));
  plan.blocks_per_sm = step_blocks_per_sm(p.accumulator) * kStepThreads / plan.cut.threads;
  plan.blocks = p.batch * p.value_heads * plan.tiles;
  plan.smem_bytes =
      (4 * kMaxKeys + 3 * kStepThreads / 32 + 2 * kStepThreads * kStepValues) * size_of(p.accumulator);  // Shared
  return plan;
}

// Compulsory global memory traffic: the state read and written, the rest once.
constexpr int64_t step_bytes(const StepParams& p) {
  const auto bytes = [&](const StepParams::Rows& x, int64_t heads, int64_t size) {
    return x ? p.batch * heads * size * size_of(x.dtype) : 0;
  };
  const int64_t H = p.heads, HV = p.value_heads, K = p.keys, V = p.size;
  return 2 * bytes(p.S, HV, K * V) + bytes(p.q, H, K) + bytes(p.k, H, K) + bytes(p.erase, H, K) + bytes(p.v, HV, V) +
         bytes(p.o, HV, V) + bytes(p.beta, HV, 1) + bytes(p.decay, HV, p.form == Decay::kKey ? K : 1);
}

constexpr int kStepKernels = 4;

}  // namespace seqkern::delta_rule::cuda

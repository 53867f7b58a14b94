// How a step is cut on a GPU and what it needs.
#pragma once
#include "common/state_step.h"
#include "linear_attention/tile.h"

namespace seqkern::linear_attention::cuda {

constexpr int kStepValues = 4;     // of a thread, at most
constexpr int kStepThreads = 256;  // of a block, where blocks share a head

struct StepTile {
  int threads, blocks_per_sm;
};
constexpr StepTile pick_step_tile(DType accumulator) {
  return {.threads = accumulator == DType::kFloat64 ? 512 : 1024, .blocks_per_sm = 1};
}

struct StepPlan {
  StateCut cut;
  int tiles;  // blocks of a head
  int blocks_per_sm;
  int64_t blocks, smem_bytes;
};

// A normalizer's z and m belong to a block: there it has all values of the head, else the grid cuts them.
constexpr StepPlan plan_step(const StepParams& p) {
  const bool whole_head = p.normalizer != Normalizer::kNone;
  const int most_threads = pick_step_tile(p.accumulator).threads;
  StepPlan plan{};
  plan.cut = cut_state(p.keys, p.size, p.S.rows.i < p.S.v, p.accumulator, whole_head ? most_threads : kStepThreads);
  plan.blocks_per_sm = most_threads / plan.cut.threads;
  plan.tiles = whole_head ? 1 : static_cast<int>(ceil_div(p.size, plan.cut.width));
  plan.blocks = p.batch * p.value_heads * plan.tiles;
  plan.smem_bytes = (3 * kMaxKeys + 2 * most_threads / 32 + most_threads * kStepValues) * size_of(p.accumulator);
  return plan;
}

// Compulsory global memory traffic: the state read and written, the rest once.
constexpr int64_t step_bytes(const StepParams& p) {
  const auto bytes = [&](const StepParams::Rows& x, int64_t heads, int64_t size) {
    return x ? p.batch * heads * size * size_of(x.dtype) : 0;
  };
  const auto once = [](const Array& x, int64_t count) { return x ? count * size_of(x.dtype) : 0; };
  const int64_t H = p.heads, HV = p.value_heads, K = p.keys, V = p.size;
  return 2 * (bytes(p.S.rows, HV, K * V) + bytes(p.z, HV, K) + bytes(p.m, HV, 1)) + bytes(p.q, H, K) +
         bytes(p.k, H, K) + bytes(p.v, HV, V) + bytes(p.y, HV, V) + bytes(p.gate, HV, V) +
         bytes(p.decay, p.decay.b == 0 ? 0 : HV, p.form == Form::kKey ? K : 1) + bytes(p.input, HV, 1) + once(p.A, HV) +
         once(p.bias, HV) + once(p.bonus, H * K) + once(p.skip, HV * (p.skip_v == 0 ? 1 : V));
}

constexpr int kStepKernels = 4;

}  // namespace seqkern::linear_attention::cuda

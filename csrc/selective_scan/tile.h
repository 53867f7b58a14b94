// Pure functions of shape: how the work is cut on a GPU and what it needs. Callable without a GPU; the launches use the
// same plans that are printed.
#pragma once
#include "selective_scan/tile_bwd.h"
#include "selective_scan/warp_tile.h"

namespace seqkern::selective_scan::cuda {

struct FwdTile {
  int warps;          // of a block, at most
  int blocks_per_sm;  // planned; bounds the registers
};

// A constant B or C lies in shared memory by channel, of one warp.
constexpr FwdTile pick_fwd_tile(DType accumulator, bool plain) {
  if (plain) return {.warps = 4, .blocks_per_sm = 3};
  return {.warps = 1, .blocks_per_sm = accumulator == DType::kFloat64 ? 6 : 8};
}

struct FwdPlan {
  Kind kind;
  FwdTile tile;
  Cut cut;
  int64_t blocks;
  int64_t smem_bytes;
  int64_t workspace_bytes;
};

constexpr const char* why(Kind kind) {
  switch (kind) {
    case Kind::kSlice4:
      return "fp32, N <= 4: 4 states at a time";
    case Kind::kSlice8:
      return "fp32, N <= 8: 8 states at a time";
    case Kind::kSlice16:
      return "fp32, N > 8: 16 states at a time";
    case Kind::kGeneral:
      return "constant B or C, or two_exp_minus_one: 16 states at a time";
    case Kind::kDouble:
      return "fp64: 8 states at a time";
    case Kind::kComplex:
      return "complex A: 8 states at a time";
    default:
      return "complex A in fp64: 4 states at a time";
  }
}

// Compulsory global memory traffic: every tensor once.
constexpr int64_t tokens_bytes(const Inputs& in, const Data& x) {
  return x ? in.sequences.batch * in.channels * in.sequences.length * size_of(x.dtype) : 0;
}
constexpr int64_t projection_bytes(const Inputs& in, const Projection& x) {
  const int64_t rows = x.constant() ? in.channels : in.sequences.batch * x.groups * in.sequences.length;
  return rows * in.states * in.parts() * size_of(x.dtype);
}
constexpr int64_t array_bytes(const Array& x, int64_t elements) {
  return x ? elements * size_of(x.dtype) : 0;
}
constexpr int64_t row_elements(const Inputs& in) {  // of A, and of one row of states
  return in.channels * in.states * in.parts();
}
constexpr int64_t checkpoint_bytes(const Inputs& in) {
  return in.sequences.batch * num_chunks(in.sequences) * row_elements(in) * size_of(in.accumulator);
}
constexpr int64_t input_bytes(const Inputs& in) {
  const Sequences& s = in.sequences;
  const int64_t packing = s.cu_seqlens ? (s.count + 1) * (s.cu_seqlens_is_int64 ? 8 : 4)
                          : s.seq_idx  ? s.batch * s.length * 4
                                       : 0;
  return tokens_bytes(in, in.u) + tokens_bytes(in, in.delta) + tokens_bytes(in, in.z) + projection_bytes(in, in.B) +
         projection_bytes(in, in.C) + array_bytes(in.A, row_elements(in)) + array_bytes(in.D, in.channels) +
         array_bytes(in.delta_bias, in.channels) + array_bytes(in.initial_state, s.count * row_elements(in)) + packing;
}
constexpr int64_t fwd_bytes(const FwdParams& p) {
  return input_bytes(p) + tokens_bytes(p, p.y) + array_bytes(p.last_state, p.sequences.count * row_elements(p)) +
         (p.checkpoints ? checkpoint_bytes(p) : 0);
}
constexpr int64_t bwd_bytes(const BwdParams& p) {
  return input_bytes(p) + checkpoint_bytes(p) + tokens_bytes(p, p.dy) + tokens_bytes(p, p.du) +
         tokens_bytes(p, p.ddelta) + tokens_bytes(p, p.dz) + projection_bytes(p, p.B) + projection_bytes(p, p.C) +
         array_bytes(p.A, row_elements(p)) + array_bytes(p.D, p.channels) + array_bytes(p.delta_bias, p.channels) +
         array_bytes(p.dlast_state, p.sequences.count * row_elements(p)) +
         array_bytes(p.dinitial_state, p.sequences.count * row_elements(p));
}

// Accumulators (B, segments, N, parts, D): the states that wait for the next tile while other slices are worked on, and
// with several segments what their first pass finds: the states that enter them, and the products of their decays.
constexpr FwdPlan plan_fwd(const FwdParams& p) {
  FwdPlan plan{};
  plan.kind = pick_kind(p);
  plan.tile = pick_fwd_tile(p.accumulator, is_plain(plan.kind));
  plan.cut = cut_of(p, plan.tile.warps);
  plan.blocks = blocks_of(p, plan.cut);
  plan.smem_bytes = projection_tiles_bytes(2) + plan.tile.warps * data_tiles_bytes(4, p.accumulator);
  const int64_t arrays = plan.cut.segments > 1 ? 2 : num_slices(p) > 1 ? 1 : 0;
  plan.workspace_bytes = arrays * segment_elements(p, plan.cut) * size_of(p.accumulator);
  return plan;
}

constexpr int64_t fwd_workspace_bytes(const FwdParams& p) {
  return plan_fwd(p).workspace_bytes;
}

constexpr int kCarryThreads = 256;

// Kernel instances: one for each kind; carry for each scalar; pass_states.
constexpr int kFwdKernels = 7 + 4 + 1;

struct StepTile {
  int threads, blocks_per_sm;
};
constexpr StepTile pick_step_tile(DType accumulator) {
  return {.threads = 128, .blocks_per_sm = accumulator == DType::kFloat64 ? 4 : 8};
}

struct StepPlan {
  StepTile tile;
  int lanes;  // threads of a channel, a power of two of at most a warp
  int64_t blocks;
};

constexpr StepPlan plan_step(const StepParams& p) {
  const int64_t vector = 16 / (size_of(p.accumulator) * (p.complex ? 2 : 1));  // states of a thread
  StepPlan plan{.tile = pick_step_tile(p.accumulator), .lanes = 1, .blocks = 0};
  while (plan.lanes < 32 && plan.lanes * vector < p.states) plan.lanes *= 2;
  plan.blocks = ceil_div(p.batch * p.heads * p.size * plan.lanes, plan.tile.threads);
  return plan;
}

constexpr int64_t step_bytes(const StepParams& p) {
  const int64_t channels = p.batch * p.heads * p.size, parts = p.complex ? 2 : 1;
  const auto per_channel = [&](const StepParams::PerChannel& x, int64_t count) {
    return x ? count * size_of(x.dtype) : 0;
  };
  const int64_t of_token = per_channel(p.u, channels) + per_channel(p.delta, channels) + per_channel(p.z, channels) +
                           per_channel(p.y, channels);
  const int64_t groups = p.heads / p.B.heads_per_group;
  return of_token + per_channel(p.D, p.heads * p.size) + per_channel(p.delta_bias, p.heads * p.size) +
         2 * channels * p.states * parts * size_of(p.state.dtype) +
         p.heads * p.size * p.states * parts * size_of(p.A.dtype) +
         p.batch * groups * p.states * parts * (size_of(p.B.dtype) + size_of(p.C.dtype));
}

constexpr int kStepKernels = 4;

}  // namespace seqkern::selective_scan::cuda

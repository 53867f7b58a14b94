// Pure functions of shape: how the work is cut on a GPU and what it needs. Callable without a GPU; the launches use the
// same plans that are printed.
#pragma once
#include "common/time_tile.h"
#include "softmax_scan/params.h"

namespace seqkern::softmax_scan::cuda {

using time_scan::ceil_div, time_scan::may_be_empty;

// A channel of the scan is one value of one head. Lanes of a head: a power of two up to a warp, then whole warps; those
// beyond V have nothing to do. So heads are cut by warps only, and a sum over V is one over lanes and then over warps.
constexpr int lanes_of_head(int64_t V) {
  constexpr int kWarp = time_scan::kChannels;
  if (V > kWarp) return static_cast<int>(ceil_div(V, kWarp)) * kWarp;
  int lanes = 1;
  while (lanes < V) lanes *= 2;
  return lanes;
}

// Tokens of a chunk: the backward has more tensors to hold.
constexpr int fwd_tokens(DType accumulator) {
  return accumulator == DType::kFloat64 ? 4 : 16;
}
constexpr int bwd_tokens(DType accumulator) {
  return accumulator == DType::kFloat64 ? 4 : 8;
}

// Blocks per SM that are planned: they bound the registers.
struct Tile {
  int serial_blocks, tile_blocks;
};
constexpr Tile pick_fwd_tile(DType accumulator) {
  return {.serial_blocks = accumulator == DType::kFloat64 ? 3 : 2, .tile_blocks = 2};
}
constexpr Tile pick_bwd_tile(DType accumulator) {
  return {.serial_blocks = 2, .tile_blocks = accumulator == DType::kFloat64 ? 1 : 2};
}

// Compulsory global memory traffic: every tensor once.
constexpr int64_t head_tokens(const Inputs& in) {
  return in.sequences.batch * in.sequences.length * in.heads;
}
constexpr int64_t scores_bytes(const Inputs& in) {
  return head_tokens(in) * size_of(in.s.dtype);
}
constexpr int64_t values_bytes(const Inputs& in) {
  return head_tokens(in) * in.size * size_of(in.v.dtype);
}
constexpr int64_t normalizers_bytes(const Inputs& in) {
  return head_tokens(in) * 2 * size_of(in.accumulator);
}
constexpr int64_t state_bytes(const Inputs& in, const State& state) {
  if (!state) return 0;
  const int64_t heads = in.sequences.count * in.heads;
  return heads * (size_of(state.m.dtype) + size_of(state.n.dtype) + in.size * size_of(state.w.dtype));
}
constexpr int64_t packing_bytes(const Sequences& s) {
  return s.cu_seqlens ? (s.count + 1) * (s.cu_seqlens_is_int64 ? 8 : 4) : s.seq_idx ? s.batch * s.length * 4 : 0;
}
constexpr int64_t fwd_bytes(const FwdParams& p) {
  return scores_bytes(p) + 2 * values_bytes(p) + (p.normalizers ? normalizers_bytes(p) : 0) +
         packing_bytes(p.sequences) + state_bytes(p, p.initial_state) + state_bytes(p, p.final_state);
}
constexpr int64_t bwd_bytes(const BwdParams& p) {
  return 2 * scores_bytes(p) + 4 * values_bytes(p) + normalizers_bytes(p) + packing_bytes(p.sequences) +
         state_bytes(p, p.initial_state) + state_bytes(p, p.dfinal_state) + state_bytes(p, p.dinitial_state);
}

// `reals`: accumulators of an element and of a carry.
constexpr time_scan::Scan scan_of(const Inputs& in, int tokens, int reals, int64_t input_bytes) {
  return {.batch = in.sequences.batch,
          .length = in.sequences.length,
          .channels = in.heads * lanes_of_head(in.size),
          .split_time = in.split_time,
          .input_bytes = input_bytes,
          .tokens = tokens,
          .element = reals,
          .carry = reals,
          .accumulator = in.accumulator};
}
constexpr int kFwdReals = 3, kBwdReals = 6;

constexpr time_scan::Scan fwd_scan(const FwdParams& p) {
  return scan_of(p, fwd_tokens(p.accumulator), kFwdReals, scores_bytes(p) + values_bytes(p));
}
constexpr time_scan::Scan bwd_scan(const BwdParams& p) {
  return scan_of(p, bwd_tokens(p.accumulator), kBwdReals, normalizers_bytes(p) + 2 * values_bytes(p));
}

// Shared memory of a block of the tiled paths (time_scan::TileShared), rounded up.
constexpr int64_t tile_smem_bytes(const Inputs& in, int reals) {
  const int64_t lanes = time_scan::kChannels * size_of(in.accumulator);
  return (2 * time_scan::kTileWarps + 1) * reals * lanes + 64;
}
// And of a warp of the backward, for sums over lanes.
constexpr int64_t sums_smem_bytes(const Inputs& in) {
  return bwd_tokens(in.accumulator) * (time_scan::kChannels + 1) * size_of(in.accumulator);
}

struct FwdPlan {
  time_scan::Cut cut;
  Tile tile;
  int lanes;  // of a head
  int64_t smem_bytes, workspace_bytes;
  int launches;
  int64_t bytes;
};

constexpr FwdPlan plan_fwd(const FwdParams& p, time_scan::Choice choice) {
  FwdPlan plan{.cut = time_scan::cut_time(fwd_scan(p), choice),
               .tile = pick_fwd_tile(p.accumulator),
               .lanes = lanes_of_head(p.size),
               .smem_bytes = 0,
               .workspace_bytes = 0,
               .launches = 0,
               .bytes = fwd_bytes(p)};
  if (plan.cut.path != time_scan::Path::kSerial) plan.smem_bytes = tile_smem_bytes(p, kFwdReals);
  plan.workspace_bytes = plan.cut.workspace_bytes;
  plan.launches = plan.cut.launches + (p.final_state && may_be_empty(p.sequences) ? 1 : 0);
  return plan;
}
constexpr FwdPlan plan_fwd(const FwdParams& p) {
  return plan_fwd(p, time_scan::choose_path(fwd_scan(p)));
}

// Workspace, after what the scan needs, in accumulators:
//   sums     (B, L, H, warps of a head)                 what each warp adds to ds, where a head has several
//   states   (sequences.count, H, lanes of a head, 2)   what each lane adds to dm and dn of the initial state
struct BwdPlan {
  time_scan::Cut cut;
  Tile tile;
  int lanes, warps;            // of a head
  int64_t sums_at, states_at;  // in bytes
  int64_t smem_bytes, workspace_bytes;
  int launches;
  int64_t bytes;
};

constexpr BwdPlan plan_bwd(const BwdParams& p, time_scan::Choice choice) {
  BwdPlan plan{.cut = time_scan::cut_time(bwd_scan(p), choice),
               .tile = pick_bwd_tile(p.accumulator),
               .lanes = lanes_of_head(p.size),
               .warps = static_cast<int>(ceil_div(lanes_of_head(p.size), time_scan::kChannels)),
               .sums_at = 0,
               .states_at = 0,
               .smem_bytes = 0,
               .workspace_bytes = 0,
               .launches = 0,
               .bytes = bwd_bytes(p)};
  plan.smem_bytes = plan.cut.path == time_scan::Path::kSerial
                        ? time_scan::kSerialWarps * sums_smem_bytes(p)
                        : tile_smem_bytes(p, kBwdReals) + time_scan::kTileWarps * sums_smem_bytes(p);
  plan.sums_at = ceil_div(plan.cut.workspace_bytes, 16) * 16;
  plan.states_at = plan.sums_at + (plan.warps > 1 ? head_tokens(p) * plan.warps * size_of(p.accumulator) : 0);
  plan.workspace_bytes = plan.states_at;
  if (p.dinitial_state) {
    plan.workspace_bytes += p.sequences.count * p.heads * plan.lanes * 2 * size_of(p.accumulator);
  }
  plan.launches = plan.cut.launches + (plan.warps > 1 ? 1 : 0) + (p.dinitial_state ? 1 : 0);
  return plan;
}
constexpr BwdPlan plan_bwd(const BwdParams& p) {
  return plan_bwd(p, time_scan::choose_path(bwd_scan(p)));
}

constexpr int64_t fwd_workspace_bytes(const FwdParams& p) {
  return plan_fwd(p).workspace_bytes;
}
constexpr int64_t bwd_workspace_bytes(const BwdParams& p) {
  return plan_bwd(p).workspace_bytes;
}

// The launches, on a plan that need not be the one that would be chosen.
void fwd(const FwdParams& p, const FwdPlan& plan, Stream stream);
void bwd(const BwdParams& p, const BwdPlan& plan, Stream stream);

constexpr int kSmallThreads = 256;  // of the kernels beside the scans

// Instances of kernels, each for fp32 and fp64: serial, tile, and those for states and sums; and one that clears flags.
constexpr int kFwdKernels = 2 * 3 + 1;
constexpr int kBwdKernels = 2 * 2;
constexpr int kBwdReduceKernels = 2 * 2;

struct StepTile {
  int threads, blocks_per_sm;
};
constexpr StepTile pick_step_tile(DType) {
  return {.threads = 128, .blocks_per_sm = 8};
}

struct StepPlan {
  StepTile tile;
  int lanes;  // threads of a head, a power of two of at most a warp
  int64_t blocks;
};

constexpr StepPlan plan_step(const StepParams& p) {
  const int lanes = lanes_of_head(p.size);
  StepPlan plan{.tile = pick_step_tile(p.accumulator), .lanes = lanes < 32 ? lanes : 32, .blocks = 0};
  plan.blocks = ceil_div(p.batch * p.heads * plan.lanes, plan.tile.threads);
  return plan;
}

constexpr int64_t step_bytes(const StepParams& p) {
  const int64_t heads = p.batch * p.heads;
  return heads * (size_of(p.s.dtype) + 2 * size_of(p.m.dtype) + 2 * size_of(p.n.dtype)) +
         heads * p.size * (2 * size_of(p.w.dtype) + size_of(p.v.dtype) + size_of(p.o.dtype));
}

constexpr int kStepKernels = 2;

}  // namespace seqkern::softmax_scan::cuda

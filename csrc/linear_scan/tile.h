// Pure functions of shape: how the work is cut on a GPU and what it needs. Callable without a GPU; the launches use the
// same plans that are printed.
#pragma once
#include "common/time_tile.h"
#include "linear_scan/params.h"

namespace seqkern::linear_scan::cuda {

using time_scan::ceil_div, time_scan::may_be_empty;

// Tokens of a chunk: 64 bytes of registers for each tensor, half as many in the backward, which has more tensors.
constexpr int scalar_bytes(DType accumulator, bool complex) {
  return static_cast<int>(size_of(accumulator)) * (complex ? 2 : 1);
}
constexpr int fwd_tokens(DType accumulator, bool complex) {
  return 64 / scalar_bytes(accumulator, complex);
}
constexpr int bwd_tokens(DType accumulator, bool complex) {
  return 32 / scalar_bytes(accumulator, complex);
}

// Blocks per SM that are planned: they bound the registers.
struct Tile {
  int serial_blocks, tile_blocks;
};
constexpr Tile kTile = {.serial_blocks = 3, .tile_blocks = 2};

// Compulsory global memory traffic: every tensor once.
constexpr int64_t tokens(const Inputs& in) {
  return in.sequences.batch * in.sequences.length * in.channels;
}
constexpr int64_t tokens_bytes(const Inputs& in, const Data& x) {
  return x ? tokens(in) * in.parts() * size_of(x.dtype) : 0;
}
constexpr int64_t decay_numbers(const Inputs& in) {
  const int64_t rows = in.a.stride.b == 0 ? 1 : in.sequences.batch,
                times = in.a.stride.l == 0 ? 1 : in.sequences.length;
  return rows * times * (in.a.stride.d == 0 ? 1 : in.channels);
}
constexpr int64_t decay_bytes(const Inputs& in) {
  return decay_numbers(in) * in.parts() * size_of(in.a.dtype);
}
constexpr int64_t states_bytes(const Inputs& in, const Array& x) {
  return x ? in.sequences.count * in.channels * in.parts() * size_of(x.dtype) : 0;
}
constexpr int64_t time_bytes(const Inputs& in) {  // of what is said about tokens
  const Sequences& s = in.sequences;
  const int64_t packing = s.cu_seqlens ? (s.count + 1) * (s.cu_seqlens_is_int64 ? 8 : 4)
                          : s.seq_idx  ? s.batch * s.length * 4
                                       : 0;
  return packing + (in.reset ? s.batch * s.length : 0);
}
constexpr int64_t fwd_bytes(const FwdParams& p) {
  return decay_bytes(p) + tokens_bytes(p, p.b) + tokens_bytes(p, p.h) + time_bytes(p) +
         states_bytes(p, p.initial_state) + states_bytes(p, p.final_state);
}

// An element is a pair of numbers, a state one.
constexpr time_scan::Scan scan_of(const Inputs& in, int tokens, int64_t input_bytes) {
  const int parts = static_cast<int>(in.parts());
  return {.batch = in.sequences.batch,
          .length = in.sequences.length,
          .channels = in.channels,
          .split_time = in.split_time,
          .input_bytes = input_bytes,
          .tokens = tokens,
          .element = 2 * parts,
          .carry = parts,
          .accumulator = in.accumulator};
}

struct FwdPlan {
  time_scan::Cut cut;
  Tile tile;
  int64_t smem_bytes, workspace_bytes;
  int launches;
  int64_t bytes;
};

constexpr int64_t tile_smem_bytes(const Inputs& in) {
  const int64_t lanes = time_scan::kChannels * scalar_bytes(in.accumulator, in.complex);
  return (3 * time_scan::kTileWarps + 1) * lanes + 16;
}

constexpr time_scan::Scan fwd_scan(const FwdParams& p) {
  return scan_of(p, fwd_tokens(p.accumulator, p.complex), decay_bytes(p) + tokens_bytes(p, p.b));
}

constexpr FwdPlan plan_fwd(const FwdParams& p, time_scan::Choice choice) {
  FwdPlan plan{.cut = time_scan::cut_time(fwd_scan(p), choice),
               .tile = kTile,
               .smem_bytes = 0,
               .workspace_bytes = 0,
               .launches = 0,
               .bytes = fwd_bytes(p)};
  if (plan.cut.path != time_scan::Path::kSerial) plan.smem_bytes = tile_smem_bytes(p);
  plan.workspace_bytes = plan.cut.workspace_bytes;
  plan.launches = plan.cut.launches + (p.final_state && may_be_empty(p.sequences) ? 1 : 0);
  return plan;
}
constexpr FwdPlan plan_fwd(const FwdParams& p) {
  return plan_fwd(p, time_scan::choose_path(fwd_scan(p)));
}
constexpr int64_t fwd_workspace_bytes(const FwdParams& p) {
  return plan_fwd(p).workspace_bytes;
}

// How da comes about [da]. Over dimensions where a is constant it is summed: the scan leaves what each warp or tile has
// in the workspace, numbers (B, times, columns), and a second kernel adds them up.
struct DecaySums {
  bool over_batch, over_time, over_channels;
  int64_t times;    // L, or where it is summed over time the tiles of a row
  int64_t columns;  // D, or where it is summed over channels the warps of a row
  int lanes;        // threads of the second kernel for one number of da

  constexpr explicit operator bool() const { return over_batch || over_time || over_channels; }
};

constexpr DecaySums decay_sums(const BwdParams& p, const time_scan::Cut& cut) {
  if (!p.da) return {};
  const Sequences& s = p.sequences;
  DecaySums sums{.over_batch = p.da.stride.b == 0 && s.batch != 1,
                 .over_time = p.da.stride.l == 0 && s.length != 1,
                 .over_channels = p.da.stride.d == 0 && p.channels != 1,
                 .times = s.length,
                 .columns = p.channels,
                 .lanes = 1};
  if (sums.over_time) sums.times = cut.tiles, sums.lanes = 8;
  if (sums.over_channels) sums.columns = cut.chains_of_row, sums.lanes = 32;
  return sums;
}

struct BwdPlan {
  time_scan::Cut cut;
  Tile tile;
  DecaySums sums;
  int64_t sums_at;  // in the workspace, after what the scan needs
  int64_t smem_bytes, workspace_bytes;
  int launches;
  int64_t bytes;
};

constexpr time_scan::Scan bwd_scan(const BwdParams& p) {
  return scan_of(p, bwd_tokens(p.accumulator, p.complex), decay_bytes(p) + tokens_bytes(p, p.dh));
}

constexpr int64_t bwd_bytes(const BwdParams& p) {
  return (p.da ? 2 : 1) * decay_bytes(p) + tokens_bytes(p, p.dh) + tokens_bytes(p, p.h) + tokens_bytes(p, p.db) +
         time_bytes(p) + states_bytes(p, p.dfinal_state) + states_bytes(p, p.dinitial_state) +
         (p.da ? states_bytes(p, p.initial_state) : 0);
}

constexpr BwdPlan plan_bwd(const BwdParams& p, time_scan::Choice choice) {
  BwdPlan plan{.cut = time_scan::cut_time(bwd_scan(p), choice),
               .tile = kTile,
               .sums = {},
               .sums_at = 0,
               .smem_bytes = 0,
               .workspace_bytes = 0,
               .launches = 0,
               .bytes = bwd_bytes(p)};
  if (plan.cut.path != time_scan::Path::kSerial) plan.smem_bytes = tile_smem_bytes(p);
  plan.sums = decay_sums(p, plan.cut);
  plan.sums_at = ceil_div(plan.cut.workspace_bytes, 16) * 16;
  plan.workspace_bytes = plan.sums_at;
  if (plan.sums) {
    plan.workspace_bytes +=
        p.sequences.batch * plan.sums.times * plan.sums.columns * scalar_bytes(p.accumulator, p.complex);
  }
  plan.launches = plan.cut.launches + (p.dinitial_state && may_be_empty(p.sequences) ? 1 : 0) + (plan.sums ? 1 : 0);
  return plan;
}
constexpr BwdPlan plan_bwd(const BwdParams& p) {
  return plan_bwd(p, time_scan::choose_path(bwd_scan(p)));
}
constexpr int64_t bwd_workspace_bytes(const BwdParams& p) {
  return plan_bwd(p).workspace_bytes;
}

constexpr Data partial_sums(const BwdParams& p, const BwdPlan& plan) {
  return {static_cast<char*>(p.workspace) + plan.sums_at,
          p.accumulator,
          {.b = plan.sums.times * plan.sums.columns, .d = 1, .l = plan.sums.columns}};
}

// The launches, on a plan that need not be the one that would be chosen.
void fwd(const FwdParams& p, const FwdPlan& plan, Stream stream);
void bwd(const BwdParams& p, const BwdPlan& plan, Stream stream);
void bwd_reduce(const BwdParams& p, const BwdPlan& plan, Stream stream);

constexpr int kSmallThreads = 256;  // of the kernels beside the scans

// Instances of kernels, each for real and complex numbers in fp32 and fp64: serial and tile; sums of da. And one that
// clears flags, one that passes states on.
constexpr int kFwdKernels = 2 * 4 + 2;
constexpr int kBwdKernels = 2 * 4;
constexpr int kBwdReduceKernels = 4;

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

constexpr int64_t step_bytes(const StepParams& p) {
  const int64_t decays = (p.a.b == 0 ? 1 : p.batch) * (p.a.d == 0 ? 1 : p.channels);
  const int64_t numbers = decays * size_of(p.a.dtype) +
                          p.batch * p.channels * (2 * size_of(p.state.dtype) + size_of(p.b.dtype) + size_of(p.h.dtype));
  return numbers * (p.complex ? 2 : 1);
}

constexpr int kStepKernels = 4;

}  // namespace seqkern::linear_scan::cuda

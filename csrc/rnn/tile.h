// How the work is cut on a GPU, as pure functions of shapes and of what the device allows; callable without a GPU.
//
// A head fits a block if its R stays there for all tokens: in registers, and what they cannot hold in shared memory.
// Such a head takes the fused path, where a block owns a head of 8 sequences, and nothing waits for another block. All
// others take the stepwise one.
#pragma once
#include "common/limits.h"
#include "common/sizes.h"
#include "rnn/params.h"

namespace seqkern::rnn::cuda {

enum class Path : int64_t { kFused, kStepwise };

constexpr int kRows = 8;                     // sequences of a block: columns of its products (common/mma.cuh)
constexpr int kStrip = 16;                   // units of a warp: rows of its products
constexpr int kAhead = 4;                    // tokens that are in shared memory, or on their way there
constexpr int kChunkBytes = 16;              // what a thread takes of a row of an operand at once,
constexpr int kBlockChunks = 4;              // and the four threads of that row: a block of the product's depth
constexpr int kPeriodChunks = 8;             // rows of operands take multiples of this: all banks
constexpr int kTracks = 9;                   // tensors in which a block knows where its sequences begin,
constexpr int kRowBytes = 32 + 8 * kTracks;  // and what it knows of each
constexpr int kThreadsOfWarp = 32;
constexpr int64_t kMostTokens = (int64_t{1} << 31) - 1 - kAhead;  // of a row: kernels count in 32 bits

// Kernels are compiled for two numbers of warps. The fewer there are, the more registers has each.
constexpr int kFewWarps = 8, kManyWarps = 12;

constexpr int most_warps(int gates, int size, int64_t warps) {
  return size == 2 && (gates == 1 || warps > kFewWarps) ? kManyWarps : kFewWarps;
}
// Of depth, where h is the operand.
constexpr int most_blocks(int size, int most_warps) {
  return static_cast<int>(ceil_div(int64_t{most_warps} * kStrip * size, kBlockChunks * kChunkBytes));
}
// Of each gate, in a forward kernel: blocks of depth of R that a thread holds in registers, 8 of them for each block.
// Of the 255 that a thread has with 8 warps R takes 128 at most; of the 168 with 12, and where fp32 needs them for the
// halves of its numbers, 96.
constexpr int held_blocks(int gates, int size, int most) {
  const int room = (most == kFewWarps && size == 2 ? 128 : 96) / 8 / gates, all = most_blocks(size, most);
  return room < all ? room : all;
}

// The shared memory of a block, in this order: two operands (8, row_chunks), bias (G, 16 warps) in fp32, what is
// known of the 8 sequences, tokens on their way, and R's fragments that are not in registers.
struct Fused {
  int warps, most_warps;  // that the block has, and those that its kernel is compiled for
  int depth;              // blocks of depth of an operand's row
  int row_chunks;         // 16-byte chunks from one row of an operand to the next
  int64_t tiles;          // of 8 sequences
  int ahead;              // tokens on their way
  int64_t bias_at;        // where they begin, in bytes
  int64_t rows_at;        //
  int64_t ring_at;        //
  int64_t rest_at;        //
  float dropout_scale;    // of the elements of h that a product sees
  float zoneout_share;    // of h_{t-1} in h_t, where they are mixed
};

struct Plan {
  Path path;
  const char* why;
  Fused fused;           // on the fused path, as all below
  int64_t blocks;        // tiles x H
  int64_t waves;         // rounds that the device takes for them if each has a multiprocessor of its own
  int64_t held_percent;  // of R's fragments, in registers
  int64_t smem_bytes;
};

// What differs between forward and backward.
struct Demand {
  int64_t depth_bytes;  // of a row of the operand
  int held;             // blocks of depth in registers
  int tiles;            // products of 16 rows that a warp has for each block of depth
  int64_t token_bytes;  // of a token, on its way to a thread
  int ahead;            // tokens on their way
};

constexpr Plan stepwise(const char* why) {
  return {
      .path = Path::kStepwise, .why = why, .fused = {}, .blocks = 0, .waves = 0, .held_percent = 0, .smem_bytes = 0};
}

constexpr int warps_of(const Inputs& in) {
  return static_cast<int>(at_least(1, at_most(ceil_div(in.units, kStrip), kManyWarps + 1)));
}

constexpr Plan plan(const Inputs& in, const Limits& limits, const Demand& demand) {
  const int size = static_cast<int>(size_of(in.x.dtype)), warps = warps_of(in);
  const int most = most_warps(in.sizes().gates, size, warps);
  if (size == 8) return stepwise("fp64: no tensor cores");
  if (in.proj) return stepwise("proj: every unit of h needs all of m");
  if (in.sequences.length > kMostTokens) return stepwise("more tokens than a fused kernel counts");
  if (warps > most) return stepwise("a head has more units than the warps of a block can own");

  Fused fused{};
  fused.warps = warps, fused.most_warps = most;
  fused.depth = static_cast<int>(ceil_div(demand.depth_bytes, kBlockChunks * kChunkBytes));
  fused.row_chunks = static_cast<int>(round_up(fused.depth * kBlockChunks, kPeriodChunks));
  fused.ahead = demand.ahead;
  const int64_t sequences = in.sequences.cu_seqlens ? in.sequences.count : in.sequences.batch;
  fused.tiles = in.units > 0 ? ceil_div(sequences, kRows) : 0;
  fused.dropout_scale = in.drops() ? static_cast<float>(1 / (1 - in.recurrent_dropout)) : 1.0f;
  fused.zoneout_share = in.training ? 0.0f : static_cast<float>(in.zoneout);

  const int threads = warps * kThreadsOfWarp;
  const int64_t rest = at_least(0, fused.depth - demand.held), blocks = fused.tiles * in.heads;
  fused.bias_at = 2 * kRows * fused.row_chunks * kChunkBytes;
  fused.rows_at = fused.bias_at + in.sizes().gates * warps * kStrip * 4;
  fused.ring_at = fused.rows_at + kRows * kRowBytes;
  fused.rest_at = fused.ring_at + demand.ahead * threads * demand.token_bytes;
  const int64_t smem_bytes = fused.rest_at + rest * demand.tiles * 2 * kChunkBytes * threads;
  if (smem_bytes > limits.shared_bytes) return stepwise("R is larger than registers and shared memory");
  return {.path = Path::kFused,
          .why = rest > 0 ? "R stays in registers and shared memory" : "R stays in registers",
          .fused = fused,
          .blocks = blocks,
          .waves = limits.multiprocessors > 0 ? ceil_div(blocks, limits.multiprocessors) : blocks,
          .held_percent = rest > 0 ? 100 * demand.held / fused.depth : 100,
          .smem_bytes = smem_bytes};
}

constexpr Plan plan_fwd(const Inputs& in, const Limits& limits) {
  const int gates = in.sizes().gates, size = static_cast<int>(size_of(in.x.dtype));
  return plan(in, limits,
              {.depth_bytes = in.outputs * size,
               .held = held_blocks(gates, size, most_warps(gates, size, warps_of(in))),
               .tiles = gates,
               .token_bytes = 2 * gates * 2 * size,
               .ahead = kAhead});
}

// On the current device.
Plan plan_fwd(const Inputs& in);
Plan plan_bwd(const Inputs& in);

void fused_fwd(const FwdParams& p, Stream stream);
void fused_bwd(const BwdParams& p, Stream stream);

// Instances: lstm, gru and slstm in 16 bits for both numbers of warps and in fp32, elman once for each type.
constexpr int kFusedFwdKernels = 3 * (2 * 2 + 1) + 3;

}  // namespace seqkern::rnn::cuda

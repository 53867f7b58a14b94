// How the fused backward is cut on a GPU; see tile.h. Its one product is R^T du: a warp's 16 rows are units of h_{t-1},
// its depth are all gates of all units.
#pragma once
#include "rnn/tile.h"

namespace seqkern::rnn::cuda {

// Units of a gate in the depth of the product: whole strips.
constexpr int64_t padded_units(const Inputs& in) {
  return warps_of(in) * kStrip;
}

// Blocks of the product's depth; of those, what a thread holds in registers, 8 of them for each: R takes 128 at most of
// the 255 that a thread has with 8 warps, and 88 of the 168 with 12.
constexpr int most_blocks_bwd(int gates, int size, int most) {
  return static_cast<int>(ceil_div(int64_t{most} * kStrip * gates * size, kBlockChunks * kChunkBytes));
}
constexpr int held_blocks_bwd(int gates, int size, int most) {
  const int room = (most == kFewWarps ? 128 : 88) / 8, all = most_blocks_bwd(gates, size, most);
  return room < all ? room : all;
}

// Of a token, to a thread: x, u, dh_t, h_{t-1} and c_{t-1} of two units in two sequences.
constexpr int64_t token_bytes_bwd(int gates, int carried, int size) {
  return 2 * 2 * ((2 * gates + 2) * size + carried * static_cast<int>(sizeof(float)));
}

// As many tokens on their way as there is room for.
constexpr Plan plan_bwd(const Inputs& in, const Limits& limits) {
  const CellSizes sizes = in.sizes();
  const int size = static_cast<int>(size_of(in.x.dtype));
  Plan best = {};
  for (int ahead = kAhead; ahead > 0; ahead /= 2) {
    best = plan(in, limits,
                {.depth_bytes = sizes.gates * padded_units(in) * size,
                 .held = held_blocks_bwd(sizes.gates, size, most_warps(sizes.gates, size, warps_of(in))),
                 .tiles = 1,
                 .token_bytes = token_bytes_bwd(sizes.gates, sizes.carried, size),
                 .ahead = ahead});
    if (best.path == Path::kFused) break;
  }
  return best;
}

constexpr int kFusedBwdKernels = kFusedFwdKernels;

}  // namespace seqkern::rnn::cuda

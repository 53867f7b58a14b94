// What a warp and a lane own, forward and backward alike, and how a batch is cut into warps. Pure functions of shape.
#pragma once
#include "selective_scan/params.h"

namespace seqkern::selective_scan::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t gcd(int64_t a, int64_t b) {
  return b == 0 ? a : gcd(b, a % b);
}

// A warp owns 32 channels of one batch row and walks through time in tiles of 32 tokens. For every channel it keeps a
// slice of states in registers; more states than that are walked through slice by slice within each tile.
//
//   lane = channel lane * kStateLanes + state lane
//   owns the kStateLanes channels from its channel lane * kStateLanes on,
//        and of each the 16 / sizeof(scalar) states from its state lane * that on: 16 bytes of a token of B and C
//
// So a sum over the states of one token leaves one channel to each lane, its own number.
constexpr int kTokens = static_cast<int>(kChunk);
constexpr int kWarpChannels = 32;

// Instances of the kernels: real fp32 with variable B and C and the transition exp, by the size of the slice; and one
// for each scalar that takes everything.
enum class Kind { kSlice4, kSlice8, kSlice16, kGeneral, kDouble, kComplex, kComplexDouble };

constexpr Kind pick_kind(const Inputs& in) {
  const bool is_double = in.accumulator == DType::kFloat64;
  if (in.complex) return is_double ? Kind::kComplexDouble : Kind::kComplex;
  if (is_double) return Kind::kDouble;
  if (in.two_exp || in.B.constant() || in.C.constant()) return Kind::kGeneral;
  return in.states <= 4 ? Kind::kSlice4 : in.states <= 8 ? Kind::kSlice8 : Kind::kSlice16;
}

constexpr bool is_plain(Kind kind) {
  return kind == Kind::kSlice4 || kind == Kind::kSlice8 || kind == Kind::kSlice16;
}

constexpr int state_lanes(Kind kind) {
  return kind == Kind::kSlice4 ? 1 : kind == Kind::kSlice8 ? 2 : 4;
}

constexpr int64_t scalar_bytes(const Inputs& in) {
  return size_of(in.accumulator) * in.parts();
}

// States in registers at a time.
constexpr int64_t slice_states(const Inputs& in) {
  return state_lanes(pick_kind(in)) * 16 / scalar_bytes(in);
}

constexpr int64_t num_slices(const Inputs& in) {
  return ceil_div(in.states, slice_states(in));
}

// How the batch is cut: a block has `warps` warps, which share the tiles of B and C, so its channels lie in one piece,
// the channels that have one group of B and one of C. Time may be cut into segments of whole tiles.
struct Cut {
  int64_t piece;     // channels
  int64_t blocks;    // of a piece
  int64_t segments;  // of a row
  int64_t tiles;     // of a segment
  int warps;         // of a block
  bool vectorized;   // rows of D accumulators are aligned for the channels of a lane
};

constexpr int64_t piece_channels(const Inputs& in) {
  const int64_t of_B = in.B.constant() ? in.channels : in.channels / in.B.groups;
  const int64_t of_C = in.C.constant() ? in.channels : in.channels / in.C.groups;
  return gcd(of_B, of_C);
}

// A batch of few channels is cut in time until about kAimedWarps work side by side. That costs a second pass over the
// segments, which pays where less than a quarter of these warps would be there without.
constexpr int64_t kAimedWarps = 1024;

// `warps` bounds those of a block.
constexpr Cut cut_of(const Inputs& in, int warps) {
  Cut cut{};
  cut.piece = piece_channels(in);
  const int64_t warps_of_piece = ceil_div(cut.piece, kWarpChannels);
  cut.blocks = ceil_div(warps_of_piece, warps);
  cut.warps = cut.blocks > 0 ? static_cast<int>(ceil_div(warps_of_piece, cut.blocks)) : 1;
  cut.vectorized = cut.piece % state_lanes(pick_kind(in)) == 0;

  const int64_t tiles = num_chunks(in.sequences);
  cut.segments = 1, cut.tiles = tiles;
  const int64_t total = cut.piece > 0 ? in.sequences.batch * (in.channels / cut.piece) * warps_of_piece : 0;
  if (in.split_time && total > 0 && total <= kAimedWarps / 4) {
    const int64_t wanted = ceil_div(tiles, ceil_div(kAimedWarps, total));  // tiles of a segment
    cut.tiles = wanted > 2 ? wanted : 2;
    cut.segments = ceil_div(tiles, cut.tiles);
  }
  return cut;
}

// Shared memory of `count` tiles of B or C, or of values for the tokens and channels of a warp.
constexpr int64_t projection_tiles_bytes(int count) {
  return count * kTokens * (4 + 1) * 16;
}
constexpr int64_t data_tiles_bytes(int count, DType accumulator) {
  return count * kTokens * kWarpChannels * size_of(accumulator);
}

// Blocks of a grid, in the order: batch row, segment, piece, block of the piece.
constexpr int64_t blocks_of(const Inputs& in, const Cut& cut) {
  return cut.piece > 0 ? in.sequences.batch * cut.segments * (in.channels / cut.piece) * cut.blocks : 0;
}

// A value for every segment, state, part and channel: (B, segments, N, parts, D).
constexpr int64_t segment_elements(const Inputs& in, const Cut& cut) {
  return in.sequences.batch * cut.segments * in.states * in.parts() * in.channels;
}

}  // namespace seqkern::selective_scan::cuda

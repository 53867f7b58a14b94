// How a scan over time is cut on a GPU, and the memory that its blocks share. Pure functions of shape; the kernels'
// side is time_scan.cuh.
//
// A lane owns one channel of one batch row, a warp 32 neighbouring ones: a chain. Tokens go through registers in
// chunks. Three paths:
//
//   serial      a warp walks a chain from end to end. One launch
//   two pass    a block takes a tile of a chain, a chunk for each of its warps. A first launch finds what each tile
//               does to a state that enters it; in the second every tile folds those before it, and walks. Inputs are
//               read twice, the second time from the L2 cache. One launch where a row is one tile
//   look back   the same in one pass: a tile publishes what it does to a state, looks back for the tiles before it,
//               walks, and publishes the state that leaves it. Two launches: the first clears the flags
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/sequences.h"

namespace seqkern::time_scan {

constexpr int kChannels = 32;    // of a warp
constexpr int kTileWarps = 8;    // of a tile's block, one after another in time
constexpr int kSerialWarps = 4;  // of a block of the serial path, side by side

constexpr int64_t kFullGpuChannels = 132 * 512;      // rows of channels that fill a GPU (H200: 132 SMs) by themselves
constexpr int64_t kCachedBytes = int64_t{24} << 20;  // that stay in half of the L2 cache
constexpr int64_t kFoldedTiles = 32;  // as many as one warp looks at at once; more: folding them costs too much

enum class Path { kSerial, kTwoPass, kLookBack };

constexpr const char* name(Path path) {
  return path == Path::kSerial ? "serial" : path == Path::kTwoPass ? "two pass" : "look back";
}

struct Scan {
  int64_t batch, length, channels;  // B, L, channels of a row
  bool split_time;
  int64_t input_bytes;  // that the first pass reads
  int tokens;           // of a chunk
  int element, carry;   // accumulators of a published element and of a state
  DType accumulator;
};

struct Cut {
  Path path;
  const char* why;
  int64_t chains_of_row;  // ceil(channels / 32)
  int64_t chains;         // B chains_of_row
  int64_t tiles;          // of a chain
  int64_t blocks;
  int threads, launches;
  int64_t elements_at, carries_at, workspace_bytes;  // the workspace: flags, elements, carries (time_scan.cuh)
};

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int64_t tiles_of(const Scan& scan) {
  return ceil_div(scan.length, kTileWarps * scan.tokens);
}

struct Choice {
  Path path;
  const char* why;
};

constexpr Choice choose_path(const Scan& scan) {
  if (!scan.split_time) return {Path::kSerial, "time is not to be cut"};
  if (scan.length <= scan.tokens) return {Path::kSerial, "a row is one chunk of tokens"};
  if (scan.batch * scan.channels >= kFullGpuChannels) return {Path::kSerial, "channels fill the GPU"};
  if (tiles_of(scan) == 1) return {Path::kTwoPass, "a row is one tile: no first pass"};
  if (tiles_of(scan) <= kFoldedTiles && scan.input_bytes <= kCachedBytes)
    return {Path::kTwoPass, "few channels, inputs that stay in the L2 cache"};
  return {Path::kLookBack, "few channels, inputs to be read once"};
}

// Tests name a path of their own.
constexpr Cut cut_time(const Scan& scan, Choice choice) {
  Cut cut{};
  cut.chains_of_row = ceil_div(scan.channels, kChannels);
  cut.chains = scan.batch * cut.chains_of_row;
  cut.tiles = tiles_of(scan);
  cut.path = choice.path == Path::kLookBack && cut.tiles == 1 ? Path::kTwoPass : choice.path, cut.why = choice.why;
  if (cut.path == Path::kSerial) {
    cut.threads = kSerialWarps * 32, cut.launches = 1;
    cut.tiles = 1, cut.blocks = ceil_div(cut.chains, kSerialWarps);
    return cut;
  }
  cut.threads = kTileWarps * 32, cut.launches = cut.tiles == 1 ? 1 : 2;
  cut.blocks = cut.chains * cut.tiles;
  if (cut.tiles == 1) return cut;
  const int64_t lanes = cut.blocks * kChannels * size_of(scan.accumulator);
  cut.elements_at = ceil_div(cut.blocks * 4, 256) * 256;
  cut.carries_at = cut.elements_at + lanes * scan.element;
  cut.workspace_bytes = cut.carries_at + lanes * scan.carry;
  return cut;
}
constexpr Cut cut_time(const Scan& scan) {
  return cut_time(scan, choose_path(scan));
}

// Sequences without tokens pass their states on, by a launch of its own.
constexpr bool may_be_empty(const Sequences& s) {
  return s.cu_seqlens || s.seq_idx || s.length == 0;
}

}  // namespace seqkern::time_scan

// How recurrences over chunks are cut on a GPU: what forward and backward of any of them count with.
#pragma once
#include "common/dtype.h"
#include "common/sequences.h"
#include "common/sizes.h"
#include "common/tokens.h"

namespace seqkern {

// What a block holds: a chunk's tokens, all keys, and `values` of a head's values. Their state is in registers.
struct ChunkTile {
  DType operand;  // of the products
  bool per_key;   // decays
  int tokens, keys, values;
  int blocks_per_sm;

  constexpr bool operator==(const ChunkTile&) const = default;
};

// Of the devices that there are (sm_120): every tile fits.
constexpr int64_t kSmallestSharedBytes = 99 << 10;

// Of a Matrix (common/matmul.cuh).
constexpr int64_t matrix_bytes(int64_t rows, int64_t columns, int64_t size) {
  return rows * (columns * size + 16);
}

// Compulsory global memory traffic of a tensor (B, L, heads, size).
constexpr int64_t token_bytes(const Sequences& s, const TokenData& x, int64_t heads, int64_t size) {
  return x ? s.batch * s.length * heads * size * size_of(x.dtype) : 0;
}
constexpr int64_t sequences_bytes(const Sequences& s) {
  if (s.cu_seqlens) return (s.count + 1) * (s.cu_seqlens_is_int64 ? 8 : 4);
  return s.seq_idx ? s.batch * s.length * 4 : 0;
}

// Batch rows, or sequences of cu_seqlens.
constexpr int64_t row_count(const Sequences& s) {
  return s.cu_seqlens ? s.count : s.batch;
}

// Segments of each row that run side by side, each of at least kSegmentChunks chunks: as many as a GPU (H200) has room
// for at once, beside blocks of rows, heads and values. The tokens are then read twice.
constexpr int64_t kMultiprocessors = 132, kMostSegments = 32, kSegmentChunks = 4;

constexpr int64_t choose_segments(const Sequences& s, bool split_time, const ChunkTile& tile, int64_t blocks) {
  if (!split_time || s.seq_idx || blocks == 0 || tile.tokens == 0) return 1;
  const int64_t length = s.cu_seqlens ? s.length / s.count : s.length;
  const int64_t most = length / (kSegmentChunks * tile.tokens);
  return at_least(1, at_most(at_most(kMultiprocessors * tile.blocks_per_sm / blocks, most), kMostSegments));
}

}  // namespace seqkern

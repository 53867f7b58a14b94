// Products of BFloat16 matrices by AMX tiles. Part of gemm.h.
//
// A tile has 16 rows of 64 bytes. As pairs of neighbours along k, a is a matrix of (m, k / 2) and b one of (k / 2, n):
// their tiles are 16 x 16 pairs, those of c 16 x 16 floats. Rows of a lie in one piece, and so do tiles of b.
#pragma once
#include <immintrin.h>

#include "common/gemm.h"

#define SEQKERN_AMX __attribute__((target("avx512bf16,amx-tile,amx-bf16")))

namespace seqkern {
namespace {

constexpr int kTile = 16;       // rows, pairs and columns of tiles
constexpr int kTileBytes = 64;  // of a row
constexpr int64_t kTileElements = kTile * kTileK;

// 16 elements and 16 elements as bfloat16: the first n of each, and zeros.
template <class X>
SEQKERN_AMX inline __m512i halves(const X* low, int64_t low_n, const X* high, int64_t high_n) {
  if constexpr (kSame<X, BFloat16>) {
    const auto mask = [](int64_t n) { return static_cast<__mmask16>(n >= kTile ? 0xffff : n <= 0 ? 0 : (1 << n) - 1); };
    const __m256i lower = _mm256_maskz_loadu_epi16(mask(low_n), low);
    const __m256i upper = _mm256_maskz_loadu_epi16(mask(high_n), high);
    return _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(lower), upper, 1);
  } else {
    return bit_cast<__m512i>(_mm512_cvtne2ps_pbh(load_up_to<float>(high, high_n), load_up_to<float>(low, low_n)));
  }
}

// A matrix as `count` lines of `length` contiguous elements, `stride` apart; zeros beyond.
template <class X>
struct Lines {
  const X* from;
  int64_t stride, count, length;

  // 16 pairs of neighbours within line i, from pair j on.
  SEQKERN_AMX __m512i along(int64_t i, int64_t j) const {
    const int64_t left = i < count ? length - 2 * j : 0;
    const X* const line = from + i * stride + 2 * j;
    return halves(line, left, line + kTile, left - kTile);
  }
  // 16 pairs of elements of lines 2 i and 2 i + 1, from element j on.
  SEQKERN_AMX __m512i across(int64_t i, int64_t j) const {
    alignas(kTileBytes) static constexpr uint16_t kInterleaved[kTileK] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                                          21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                                          11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const X* const even = from + 2 * i * stride + j;
    const int64_t left = length - j;
    const __m512i both = halves(even, 2 * i < count ? left : 0, even + stride, 2 * i + 1 < count ? left : 0);
    return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), both);
  }
};

// Where tiles of pairs go, in elements: the next tile below, the next one on the right, the next row of a tile.
struct Tiles {
  BFloat16* to;
  int64_t below, right, row;
};

// A matrix of (rows, columns) pairs, from lines that lie along its rows, or across them.
template <bool kAlong, bool kTransposed, class X>
SEQKERN_AMX inline void pack_pairs(const Lines<X>& lines, int64_t rows, int64_t columns, const Tiles& tiles) {
  for (int64_t row = 0; row < rows; row += kTile) {
    for (int64_t column = 0; column < columns; column += kTile) {
      Float pairs[kTile];
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) {
        const int64_t line = (kTransposed ? column : row) + i, first = kTransposed ? row : column;
        pairs[i] = bit_cast<Float>(kAlong ? lines.along(line, first) : lines.across(line, first));
      }
      if constexpr (kTransposed) transpose<float>(pairs);
      BFloat16* const tile = tiles.to + row / kTile * tiles.below + column / kTile * tiles.right;
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) __builtin_memcpy(tile + i * tiles.row, pairs + i, kTileBytes);
    }
  }
}

template <>
struct Products<BFloat16> {
  template <class X>
  static Left<BFloat16> pack_left(const X* from, int64_t row, int64_t column, int64_t m, int64_t k, BFloat16* room) {
    const int64_t to_row = tiles_of_k(k) * kTileK;
    if constexpr (kSame<X, BFloat16>) {
      if (column == 1 && m % kTile == 0 && k == to_row) return {from, row, 1};
    }
    const Tiles tiles = {room, kTile * to_row, kTileK, to_row};
    if (column == 1)
      pack_pairs<true, false>(Lines<X>{from, row, m, k}, m, to_row / 2, tiles);
    else
      pack_pairs<false, true>(Lines<X>{from, column, k, m}, m, to_row / 2, tiles);
    return {room, to_row, 1};
  }

  // `row` of the result: from one row of tiles to the next.
  template <class X>
  static Right<BFloat16> pack_right(const X* from, int64_t row, int64_t column, int64_t k, int64_t n, BFloat16* room,
                                    bool) {
    const int64_t to_row = padded<BFloat16>(n) / kTile * kTileElements;
    const Tiles tiles = {room, to_row, kTileElements, kTileK};
    if (column == 1)
      pack_pairs<false, false>(Lines<X>{from, row, k, n}, (k + 1) / 2, n, tiles);
    else
      pack_pairs<true, true>(Lines<X>{from, column, n, k}, (k + 1) / 2, n, tiles);
    return {room, to_row};
  }

  // Two tiles of rows and of columns at a time: each tile of a and b that is loaded is used twice.
  static void multiply(Left<BFloat16> a, Right<BFloat16> b, float* c, int64_t c_row, int64_t m, int64_t n, int64_t k,
                       bool accumulate, Band band) {
    for (int64_t i = 0; i < m; i += 2 * kTile) {
      const bool two_rows = i + kTile < m;
      const int64_t last = i + (two_rows ? 2 : 1) * kTile;
      const int64_t from = band == Band::kUpper ? (i < k ? i : k) / kTileK : 0;
      const int64_t to = tiles_of_k(band == Band::kLower && last < k ? last : k);
      const Left<BFloat16> rows = {a.data + i * a.row + from * kTileK, a.row, 1};
      for (int64_t j = 0; j < n; j += 2 * kTile) {
        const bool two_columns = j + kTile < n;
        const Right<BFloat16> columns = {b.data + from * b.row + j / kTile * kTileElements, b.row};
        const auto multiply_these = two_rows ? two_columns ? multiply_tiles<true, true> : multiply_tiles<true, false>
                                    : two_columns ? multiply_tiles<false, true>
                                                  : multiply_tiles<false, false>;
        multiply_these(rows, columns, c + i * c_row + j, c_row, to - from, accumulate);
      }
    }
  }

  // The tiles 0 and 1 hold a row of c, 2 and 3 the next one; 4 and 5 are of a, 6 and 7 of b. Not inlined: gcc does not
  // know that a tile is loaded from memory.
  template <bool kTwoRows, bool kTwoColumns>
  [[gnu::noinline]] SEQKERN_AMX static void multiply_tiles(Left<BFloat16> a, Right<BFloat16> b, float* c, int64_t c_row,
                                                           int64_t tiles, bool accumulate) {
    const int64_t a_bytes = a.row * int64_t{sizeof(BFloat16)}, c_bytes = c_row * int64_t{sizeof(float)};
    float* const next = c + kTile * c_row;
    if (accumulate) {
      _tile_loadd(0, c, c_bytes);
      if constexpr (kTwoColumns) _tile_loadd(1, c + kTile, c_bytes);
      if constexpr (kTwoRows) _tile_loadd(2, next, c_bytes);
      if constexpr (kTwoRows && kTwoColumns) _tile_loadd(3, next + kTile, c_bytes);
    } else {
      _tile_zero(0);
      if constexpr (kTwoColumns) _tile_zero(1);
      if constexpr (kTwoRows) _tile_zero(2);
      if constexpr (kTwoRows && kTwoColumns) _tile_zero(3);
    }
    for (; tiles > 0; --tiles, a.data += kTileK, b.data += b.row) {
      _tile_loadd(6, b.data, kTileBytes);
      _tile_loadd(4, a.data, a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kTwoRows) {
        _tile_loadd(5, a.data + kTile * a.row, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (kTwoColumns) {
        _tile_loadd(7, b.data + kTileElements, kTileBytes);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kTwoRows) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (kTwoColumns) _tile_stored(1, c + kTile, c_bytes);
    if constexpr (kTwoRows) _tile_stored(2, next, c_bytes);
    if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, next + kTile, c_bytes);
  }

  // Tells the processor that all eight tiles are whole.
  struct Scope {
    SEQKERN_AMX Scope() {
      alignas(kTileBytes) static constexpr struct {  // not on the stack: gcc takes 8 bytes of it to be read
        uint8_t palette, reserved[15];
        uint16_t row_bytes[16];
        uint8_t rows[16];
      } kWhole = {1, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
      _tile_loadconfig(&kWhole);
    }
    SEQKERN_AMX ~Scope() { _tile_release(); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
  };
};

}  // namespace
}  // namespace seqkern

#undef SEQKERN_AMX

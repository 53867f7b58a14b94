// Tiles: some elements of kLanes<A> neighbours (channels, or states) as accumulators, one vector per element, gathered
// from memory of any data type and order. Internal to cpu.cpp.
#pragma once
#include "common/simd_math.h"
#include "selective_scan/params.h"

namespace seqkern::selective_scan {
namespace {

inline int64_t at_most(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t at_least(int64_t a, int64_t b) {
  return a > b ? a : b;
}
inline int64_t round_up(int64_t x, int64_t unit) {
  return (x + unit - 1) / unit * unit;
}

// Element i of lane c is at data[c lane + i step].
struct Plane {
  void* data;
  DType dtype;
  int64_t lane, step;
};

inline Plane plane(void* data, DType dtype, int64_t offset, int64_t lane, int64_t step) {
  return {static_cast<char*>(data) + offset * size_of(dtype), dtype, lane, step};
}

// Calls body(i, n, first) for groups of up to kLanes elements [i, i + n) that follow one another in memory from
// element `first` on.
template <class A, class Body>
inline void for_each_square(const Plane& p, int64_t count, const Body& body) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const int n = static_cast<int>(at_most(kLanes<A>, count - i));
    body(i, n, p.step > 0 ? i : 1 - i - n);
  }
}

// tile[i row + c] = element i of lane c, 0 in lanes beyond `lanes`.
template <class A>
inline void load_tile(const Plane& from, int lanes, int64_t count, A* tile, int64_t row = kLanes<A>) {
  visit_dtype(from.dtype, [&]<class T>() {
    const T* const p = static_cast<const T*>(from.data);
    if (from.lane == 1) {
      for (int64_t i = 0; i < count; ++i) store<A>(tile + i * row, load<A>(p + i * from.step, lanes));
    } else if (from.step == 1 || from.step == -1) {
      for_each_square<A>(from, count, [&](int64_t i, int n, int64_t first) {
        Vec<A> rows[kLanes<A>];
        A* const to = tile + (from.step > 0 ? i : i + n - 1) * row;
        const int64_t to_row = from.step > 0 ? row : -row;
        if (lanes == kLanes<A> && n == kLanes<A>) {
          for (int c = 0; c < kLanes<A>; ++c) rows[c] = load<A>(p + c * from.lane + first);
          transpose<A>(rows);
          for (int j = 0; j < kLanes<A>; ++j) store<A>(to + j * to_row, rows[j]);
        } else {
          for (int c = 0; c < kLanes<A>; ++c) rows[c] = c < lanes ? load<A>(p + c * from.lane + first, n) : Vec<A>{};
          transpose<A>(rows);
          for (int j = 0; j < n; ++j) store<A>(to + j * to_row, rows[j]);
        }
      });
    } else {
      for (int64_t i = 0; i < count; ++i)
        for (int c = 0; c < kLanes<A>; ++c)
          tile[i * row + c] = c < lanes ? static_cast<A>(widen(p[c * from.lane + i * from.step])) : 0;
    }
  });
}

// `large`: whole lines go past the caches.
template <class A>
inline void store_tile(const A* tile, const Plane& to, int lanes, int64_t count, int64_t row = kLanes<A>,
                       bool large = false) {
  visit_dtype(to.dtype, [&]<class T>() {
    T* const p = static_cast<T*>(to.data);
    const auto put = [&](T* at, Vec<A> v, int n) {
      if (large && n == kLanes<A>)
        stream<A>(at, v);
      else
        store<A>(at, v, n);
    };
    if (to.lane == 1) {
      for (int64_t i = 0; i < count; ++i) put(p + i * to.step, load<A>(tile + i * row), lanes);
    } else if (to.step == 1 || to.step == -1) {
      for_each_square<A>(to, count, [&](int64_t i, int n, int64_t first) {
        Vec<A> rows[kLanes<A>];
        const A* const from = tile + (to.step > 0 ? i : i + n - 1) * row;
        const int64_t from_row = to.step > 0 ? row : -row;
        if (lanes == kLanes<A> && n == kLanes<A>) {
          for (int j = 0; j < kLanes<A>; ++j) rows[j] = load<A>(from + j * from_row);
          transpose<A>(rows);
          for (int c = 0; c < kLanes<A>; ++c) put(p + c * to.lane + first, rows[c], kLanes<A>);
        } else {
          for (int j = 0; j < kLanes<A>; ++j) rows[j] = j < n ? load<A>(from + j * from_row) : Vec<A>{};
          transpose<A>(rows);
          for (int c = 0; c < lanes; ++c) store<A>(p + c * to.lane + first, rows[c], n);
        }
      });
    } else {
      for (int64_t i = 0; i < count; ++i)
        for (int c = 0; c < lanes; ++c) p[c * to.lane + i * to.step] = narrow<T>(tile[i * row + c]);
    }
  });
}

// The memory of tiles yet to come, for loops over the tokens of this one to fetch line by line: processors do not
// foresee that many rows. Into the second-level cache, because rows a power of two apart evict each other from the
// first.
struct Ahead {
  struct Lines {
    const char* data;
    int64_t row;          // bytes
    int64_t mask, shift;  // line i is in row i & mask, at column i >> shift
    int64_t count;
  };
  static constexpr int kMaxTiles = 7;
  Lines tiles[kMaxTiles];
  int first = 0, last = 0;  // tiles to be fetched

  template <class A>
  void add(const Plane& p) {
    constexpr int64_t kShift = __builtin_ctz(kLanes<A>);
    const int64_t size = size_of(p.dtype);
    const char* const data = static_cast<const char*>(p.data);
    if (p.lane == 1)
      tiles[last++] = {data, p.step * size, kChunk - 1, 63, kChunk};
    else  // backwards: from the lowest address on
      tiles[last++] = {data - (p.step < 0 ? (kChunk - 1) * size : 0), p.lane * size, kLanes<A> - 1, kShift,
                       at_least(1, kChunk * size / kLine) * kLanes<A>};
  }
  // What the states [n, n + states) of N shall fetch.
  Ahead share(int64_t n, int64_t states, int64_t N) const {
    Ahead part = *this;
    part.first = static_cast<int>(n * last / N), part.last = static_cast<int>((n + states) * last / N);
    return part;
  }
  void fetch(int64_t i) const {
    for (int k = first; k < last; ++k) {
      const Lines& tile = tiles[k];
      if (i < tile.count) __builtin_prefetch(tile.data + (i & tile.mask) * tile.row + (i >> tile.shift) * kLine, 0, 2);
    }
  }

  static constexpr int64_t kLine = 64;
};

}  // namespace
}  // namespace seqkern::selective_scan

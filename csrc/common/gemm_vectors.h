// Products of float and double matrices by vectors. Part of gemm.h.
#pragma once
#include "common/gemm.h"

namespace seqkern {
namespace {

// The rows and vectors of c that stay in registers.
#if defined(__AVX512F__)
constexpr int kBlockRows = 6, kBlockVectors = 4;
#else
constexpr int kBlockRows = 6, kBlockVectors = 2;
#endif

// The first n elements, as many as there are lanes, and zeros.
template <class A, class X>
inline Vec<A> load_up_to(const X* p, int64_t n) {
  return n <= 0 ? Vec<A>{} : load<A>(p, n < kLanes<A> ? static_cast<int>(n) : kLanes<A>);
}

template <class T>
struct Products {
  struct Scope {
    Scope() {}
  };

  template <class X>
  static Left<T> pack_left(const X* from, int64_t row, int64_t column, int64_t m, int64_t k, T* room) {
    if constexpr (kSame<T, X>) return {from, row, column};
    if (column == 1) {
      copy_lines(from, row, m, k, room);
      return {room, padded<T>(k), 1};
    }
    copy_lines(from, column, k, m, room);
    return {room, 1, padded<T>(m)};
  }

  template <class X>
  static Right<T> pack_right(const X* from, int64_t row, int64_t column, int64_t k, int64_t n, T* room,
                             bool padded_rows) {
    if constexpr (kSame<T, X>) {
      if (column == 1 && padded_rows) return {from, row};
    }
    if (column == 1)
      copy_lines(from, row, k, n, room);
    else
      transpose_lines(from, column, n, k, room);
    return {room, padded<T>(n)};
  }

  // `count` lines of `length` elements, `stride` apart, as rows of whole vectors.
  template <class X>
  static void copy_lines(const X* from, int64_t stride, int64_t count, int64_t length, T* to) {
    for (int64_t i = 0; i < count; ++i, from += stride, to += padded<T>(length))
      for (int64_t j = 0; j < length; j += kLanes<T>) store<T>(to + j, load_up_to<T>(from + j, length - j));
  }
  // The same as columns.
  template <class X>
  static void transpose_lines(const X* from, int64_t stride, int64_t count, int64_t length, T* to) {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      for (int64_t j = 0; j < length; j += kLanes<T>) {
        Vec<T> block[kLanes<T>];
#pragma GCC unroll 16
        for (int l = 0; l < kLanes<T>; ++l)
          block[l] = i + l < count ? load_up_to<T>(from + (i + l) * stride + j, length - j) : Vec<T>{};
        transpose<T>(block);
#pragma GCC unroll 16
        for (int l = 0; l < kLanes<T>; ++l)
          if (j + l < length) store<T>(to + (j + l) * padded<T>(count) + i, block[l]);
      }
    }
  }
  template <int kRows, int kVectors>
  static void multiply_block(Left<T> a, Right<T> b, T* c, int64_t c_row, int64_t k, bool accumulate) {
    Vec<T> sums[kRows][kVectors];
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j) sums[i][j] = accumulate ? load<T>(c + i * c_row + j * kLanes<T>) : Vec<T>{};
    for (int64_t l = 0; l < k; ++l) {
      Vec<T> of_b[kVectors];
      for (int j = 0; j < kVectors; ++j) of_b[j] = load<T>(b.data + l * b.row + j * kLanes<T>);
      for (int i = 0; i < kRows; ++i) {
        const Vec<T> of_a = splat(a.data[i * a.row + l * a.column]);
        for (int j = 0; j < kVectors; ++j) sums[i][j] = madd(of_a, of_b[j], sums[i][j]);
      }
    }
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j) store<T>(c + i * c_row + j * kLanes<T>, sums[i][j]);
  }

  // kVectors vectors of columns, all rows.
  template <int kVectors, int kRows = kBlockRows>
  static void multiply_rows(Left<T> a, Right<T> b, T* c, int64_t c_row, int64_t begin, int64_t m, int64_t k,
                            bool accumulate, Band band) {
    int64_t i = begin;
    for (; i + kRows <= m; i += kRows) {
      const int64_t from = band == Band::kUpper ? (i < k ? i : k) : 0;
      const int64_t to = band == Band::kLower && i + kRows < k ? i + kRows : k;
      multiply_block<kRows, kVectors>({a.data + i * a.row + from * a.column, a.row, a.column},
                                      {b.data + from * b.row, b.row}, c + i * c_row, c_row, to - from, accumulate);
    }
    if constexpr (kRows > 1) {
      if (i < m) multiply_rows<kVectors, kRows - 1>(a, b, c, c_row, i, m, k, accumulate, band);
    }
  }

  // Columns in whole vectors, at most kVectors at a time.
  template <int kVectors = kBlockVectors>
  static void multiply(Left<T> a, Right<T> b, T* c, int64_t c_row, int64_t m, int64_t n, int64_t k, bool accumulate,
                       Band band) {
    constexpr int64_t kColumns = kVectors * kLanes<T>;
    for (; n > kColumns - kLanes<T>; n -= kColumns, b.data += kColumns, c += kColumns)
      multiply_rows<kVectors>(a, b, c, c_row, 0, m, k, accumulate, band);
    if constexpr (kVectors > 1) {
      if (n > 0) multiply<kVectors - 1>(a, b, c, c_row, m, n, k, accumulate, band);
    }
  }
};

}  // namespace
}  // namespace seqkern

// Matrix products of CPU kernels, on packed operands in the first two levels of cache: c = a b, or c += a b.
//
// T is the type of the operands: float or double, multiplied by vectors, or BFloat16, multiplied by the matrix unit of
// processors that have one (gemm_amx.h) with sums in float. An element of c is a sum in the order of k, whatever the
// sizes are: it depends on its row of a, its column of b and nothing else.
#pragma once
#include "common/isa.h"
#include "common/simd.h"

namespace seqkern {
namespace {

template <class T>
using SumOf = Accumulator<T>;

template <class T>
struct Left {  // a (m, k). BFloat16: column is 1, m and k are padded with zeros to whole tiles
  const T* data;
  int64_t row, column;
};
template <class T>
struct Right {  // b (k, n). n is padded to whole vectors; BFloat16: tiles of pairs, see gemm_amx.h
  const T* data;
  int64_t row;
};

enum class Band { kFull, kLower, kUpper };  // which elements of a may differ from 0: all, k <= m, k >= m

// Sizes that rows of b and c are padded to, and BFloat16's m.
template <class T>
constexpr int64_t kPadding = kSame<T, BFloat16> ? 16 : kLanes<SumOf<T>>;
template <class T>
constexpr int64_t padded(int64_t size) {
  return (size + kPadding<T> - 1) / kPadding<T> * kPadding<T>;
}

constexpr int64_t kTileK = 32;
constexpr int64_t tiles_of_k(int64_t k) {  // that BFloat16's k is padded to
  return (k + kTileK - 1) / kTileK;
}

// Elements of scratch that pack_left and pack_right need.
template <class T>
constexpr int64_t left_room(int64_t m, int64_t k) {
  return padded<T>(m) * (kSame<T, BFloat16> ? tiles_of_k(k) * kTileK : padded<T>(k));
}
template <class T>
constexpr int64_t right_room(int64_t k, int64_t n) {
  return (kSame<T, BFloat16> ? tiles_of_k(k) * kTileK : k) * padded<T>(n);
}

// How T is multiplied: gemm_vectors.h, gemm_amx.h.
template <class T>
struct Products;

// Operands from a matrix whose element (i, j) is from[i * row + j * column], where row or column is 1. float and double
// are not copied where they lie right already: for Left anywhere, for Right where column is 1 and rows are padded.
template <class T, class X>
inline Left<T> pack_left(const X* from, int64_t row, int64_t column, int64_t m, int64_t k, T* room) {
  return Products<T>::pack_left(from, row, column, m, k, room);
}
template <class T, class X>
inline Right<T> pack_right(const X* from, int64_t row, int64_t column, int64_t k, int64_t n, T* room,
                           bool padded_rows = false) {
  return Products<T>::pack_right(from, row, column, k, n, room, padded_rows);
}

// c (m, n) = a b, or += a b. Blocks of zeros that `band` promises are skipped, the other zeros must be there. Rows of c
// are padded and the padding may be written; BFloat16: c is (padded m, padded n).
template <class T>
inline void multiply(Left<T> a, Right<T> b, SumOf<T>* c, int64_t c_row, int64_t m, int64_t n, int64_t k,
                     bool accumulate, Band band = Band::kFull) {
  Products<T>::multiply(a, b, c, c_row, m, n, k, accumulate, band);
}

// While it lives, this thread may multiply<T>. One, and none inside it, around a unit of work: it costs little, but
// more than a small product.
template <class T>
struct Multiplier : Products<T>::Scope {};

// Calls body.template operator()<T>() with the type of operands for data of type X: BFloat16 where tiles multiply it.
template <class X, class Body>
inline void visit_operands(const Body& body) {
#if defined(__AVX512F__)
  if constexpr (kSame<X, BFloat16>) {
    if (amx()) return body.template operator()<BFloat16>();
  }
#endif
  body.template operator()<SumOf<X>>();
}

}  // namespace
}  // namespace seqkern

#include "common/gemm_vectors.h"
#if defined(__AVX512F__)
#include "common/gemm_amx.h"
#endif

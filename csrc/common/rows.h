// Rows of whole vectors, and arrays on their way to and from memory, for CPU kernels.
#pragma once
#include "common/simd.h"
#include "common/sizes.h"

namespace seqkern {
namespace {

template <class A>
inline void load_array(const Array& from, int64_t offset, int64_t count, A* to) {
  visit_dtype(from.dtype, [&]<class X>() { convert(static_cast<const X*>(from.data) + offset, 1, count, to); });
}
template <class A>
inline void store_array(const A* from, int64_t count, const Array& to, int64_t offset) {
  visit_dtype(to.dtype, [&]<class X>() { convert(from, 1, count, static_cast<X*>(to.data) + offset); });
}
// to[i * stride] = from[i]
template <class A, class T>
inline void store_all(const A* from, T* to, int64_t stride, int64_t count) {
  if (stride == 1) return convert(from, 1, count, to);
  for (int64_t i = 0; i < count; ++i) to[i * stride] = narrow<T>(from[i]);
}
// Elements `stride` apart; x has data and a dtype.
template <class A, class Rows>
[[gnu::noinline]] inline void load_strided(const Rows& x, int64_t offset, int64_t stride, int64_t count, A* to) {
  visit_dtype(x.dtype, [&]<class X>() { convert(static_cast<const X*>(x.data) + offset, stride, count, to); });
}
template <class A, class Rows>
[[gnu::noinline]] inline void store_strided(const A* from, const Rows& x, int64_t offset, int64_t stride,
                                            int64_t count) {
  visit_dtype(x.dtype, [&]<class X>() { store_all(from, static_cast<X*>(x.data) + offset, stride, count); });
}
// to[j, i] = from[i, j] of (m, n) elements
template <class A, class From, class To>
inline void transpose_into(const From* from, int64_t from_row, int64_t m, int64_t n, To* to, int64_t to_row) {
  constexpr int kAtOnce = kLanes<A>;
  for (int64_t i = 0; i < m; i += kAtOnce)
    for (int64_t j = 0; j < n; j += kAtOnce) {
      const int tall = static_cast<int>(at_most(m - i, kAtOnce)), wide = static_cast<int>(at_most(n - j, kAtOnce));
      Vec<A> rows[kAtOnce];
      for (int r = 0; r < kAtOnce; ++r) rows[r] = r < tall ? load<A>(from + (i + r) * from_row + j, wide) : Vec<A>{};
      transpose<A>(rows);
      for (int r = 0; r < wide; ++r) store<A>(to + (j + r) * to_row + i, rows[r], tall);
    }
}
template <class A>
inline void copy(const A* from, int64_t count, A* to) {
  convert(from, 1, count, to);
}

// ---- rows of whole vectors

template <class A>
inline void clear(A* x, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<A>) store<A>(x + i, Vec<A>{});
}
template <class A>
inline void fill(A* x, int64_t count, A value) {
  for (int64_t i = 0; i < count; i += kLanes<A>) store<A>(x + i, splat(value));
}
// to = a x
template <class A>
inline void scale_row(A a, const A* x, int64_t count, A* to) {
  for (int64_t i = 0; i < count; i += kLanes<A>) store<A>(to + i, splat(a) * load<A>(x + i));
}
// to = a * x
template <class A>
inline void multiply_row(const A* a, const A* x, int64_t count, A* to) {
  for (int64_t i = 0; i < count; i += kLanes<A>) store<A>(to + i, load<A>(a + i) * load<A>(x + i));
}
// sum += a x
template <class A>
inline void add_row(A a, const A* x, int64_t count, A* sum) {
  for (int64_t i = 0; i < count; i += kLanes<A>) store<A>(sum + i, madd(splat(a), load<A>(x + i), load<A>(sum + i)));
}
// sum += x * y
template <class A>
inline void add_products(const A* x, const A* y, int64_t count, A* sum) {
  for (int64_t i = 0; i < count; i += kLanes<A>)
    store<A>(sum + i, madd(load<A>(x + i), load<A>(y + i), load<A>(sum + i)));
}
// x . y, still by lanes
template <class A>
inline Vec<A> dot_lanes(const A* x, const A* y, int64_t count) {
  Vec<A> sum{};
  for (int64_t i = 0; i < count; i += kLanes<A>) sum = madd(load<A>(x + i), load<A>(y + i), sum);
  return sum;
}
template <class A>
inline A dot(const A* x, const A* y, int64_t count) {
  return sum_of_lanes<A>(dot_lanes(x, y, count));
}
// to[i] = the sum of the lanes of row(i), for i < count; whole vectors are written.
template <class A, class Row>
inline void sums_of_rows(int64_t count, A* to, const Row& row) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    Vec<A> rows[kLanes<A>];
    for (int j = 0; j < kLanes<A>; ++j) rows[j] = i + j < count ? row(i + j) : Vec<A>{};
    store<A>(to + i, sums_of_lanes<A>(rows));
  }
}

}  // namespace
}  // namespace seqkern

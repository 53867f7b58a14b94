// [solve] by blocks of rows: what the rows of other blocks contribute is a product of matrices, the triangle of a block
// is substituted in registers. Internal to cpu.cpp.
#pragma once
#include "common/chunk.h"

namespace seqkern::delta_rule {
namespace {

// Rows of a triangle, whose vectors of one strip fit into the registers.
#if defined(__AVX512F__)
constexpr int64_t kSolved = 16;
#else
constexpr int64_t kSolved = 8;
#endif

// x (kSolved, row) in place: x_i += sum over j < i of system_ij x_j, from the first row to the last; kTransposed: of
// system_ji x_j, j > i, from the last to the first.
template <bool kTransposed, class A>
inline void solve_triangle(const A* system, A* x, int64_t row) {
  constexpr int kRows = static_cast<int>(kSolved);
  for (int64_t at = 0; at < row; at += kLanes<A>) {
    Vec<A> rows[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) rows[i] = load<A>(x + i * row + at);
#pragma GCC unroll 16
    for (int n = 0; n < kRows; ++n) {
      const int j = kTransposed ? kRows - 1 - n : n;
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        if (!kTransposed && i > j) rows[i] = madd(splat(system[i * kChunk + j]), rows[j], rows[i]);
        if (kTransposed && i < j) rows[i] = madd(splat(system[j * kChunk + i]), rows[j], rows[i]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) store<A>(x + i * row + at, rows[i]);
  }
}

// x (tokens, row) becomes (I - system)^-1 x, or its transpose's; system (tokens, kChunk) is read below its diagonal.
// Rows of x after the last token, to a whole block, must exist and are lost.
template <bool kTransposed, class A>
inline void solve(const A* system, int64_t count, A* x, int64_t row) {
  const int64_t blocks = ceil_div(count, kSolved);
  for (int64_t n = 0; n < blocks; ++n) {
    const int64_t start = (kTransposed ? blocks - 1 - n : n) * kSolved, end = at_most(start + kSolved, count);
    A* const of_block = x + start * row;
    if (kTransposed && end < count)
      multiply<A>({system + end * kChunk + start, 1, kChunk}, {x + end * row, row}, of_block, row, end - start, row,
                  count - end, true);
    if (!kTransposed && start > 0)
      multiply<A>({system + start * kChunk, kChunk, 1}, {x, row}, of_block, row, end - start, row, start, true);
    solve_triangle<kTransposed>(system + start * kChunk + start, of_block, row);
  }
}

}  // namespace
}  // namespace seqkern::delta_rule

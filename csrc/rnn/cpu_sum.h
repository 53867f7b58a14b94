// [weights] Sums over tokens, as products of matrices whose k is time. Internal to cpu.cpp.
//
// A tile of the result is a sum over chunks of tokens, each of which is summed by itself: roundings of a sum over many
// tokens stay small, and the order of summation depends on nothing but the number of tokens.
#pragma once
#include "common/gemm.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "rnn/params.h"

namespace seqkern::rnn {
namespace {

// T: operands.
template <class T>
struct Sum {
  using A = SumOf<T>;
  static constexpr int64_t kRows = 96, kColumns = 256, kChunk = 256;  // of a tile; tokens

  const SumParams& p;
  const int64_t across = ceil_div(p.columns, kColumns), down = ceil_div(p.rows, kRows);  // tiles

  struct Room {
    Scratch scratch{(left_room<T>(kRows, kChunk) + right_room<T>(kChunk, kColumns)) * static_cast<int64_t>(sizeof(T)) +
                    2 * kRows * kColumns * static_cast<int64_t>(sizeof(A))};
    T* const left = scratch.take<T>(left_room<T>(kRows, kChunk));
    T* const right = scratch.take<T>(right_room<T>(kChunk, kColumns));
    A* const sum = scratch.take<A>(kRows * kColumns);
    A* const chunk = scratch.take<A>(kRows * kColumns);
  };

  void run() const {
    const int64_t work = at_least(1, p.tokens * at_most(p.rows, kRows) * at_most(p.columns, kColumns));
    parallel_for(0, p.heads * down * across, kGrain / work + 1, [&](int64_t begin, int64_t end) {
      const Room room;
      const Multiplier<T> multiplier;
      for (int64_t i = begin; i < end; ++i)
        sum_tile(i / across / down, i / across % down * kRows, i % across * kColumns, room);
    });
  }

  // Rows from `row` on and columns from `column` on of a head.
  void sum_tile(int64_t head, int64_t row, int64_t column, const Room& room) const {
    const int64_t rows = at_most(kRows, p.rows - row), columns = at_most(kColumns, p.columns - column);
    clear(room.sum, rows * kColumns);
    for (int64_t t = 0; t < p.tokens; t += kChunk) {
      const int64_t tokens = at_most(kChunk, p.tokens - t);
      visit(p.left, [&](const auto* left) {
        visit(p.right, [&](const auto* right) {
          multiply(
              pack_left(left + t * p.left.t + head * p.left.h + row, 1, p.left.t, rows, tokens, room.left),
              pack_right(right + t * p.right.t + head * p.right.h + column, p.right.t, 1, tokens, columns, room.right),
              room.chunk, kColumns, rows, columns, tokens, false);
        });
      });
      for (int64_t i = 0; i < rows; ++i) add_row(A{1}, room.chunk + i * kColumns, columns, room.sum + i * kColumns);
    }
    for (int64_t i = 0; i < rows; ++i)
      store_array(room.sum + i * kColumns, columns, p.out, head * p.out_head + (row + i) * p.columns + column);
  }

  // body(data) with the elements as they are: double and BFloat16 operands are nothing else.
  template <class Body>
  static void visit(const SumParams::Side& side, const Body& body) {
    if constexpr (kSame<T, float>)
      visit_dtype(side.dtype, [&]<class X>() { body(static_cast<const X*>(side.data)); });
    else
      body(static_cast<const T*>(side.data));
  }

  static constexpr int64_t kGrain = 1 << 18;  // products worth another thread
};

inline void sum_tokens(const SumParams& p) {
  const auto run = [&]<class T>() { Sum<T>{p}.run(); };
  if (p.accumulator == DType::kFloat64) return run.template operator()<double>();
  if (p.left.dtype == DType::kBFloat16 && p.right.dtype == DType::kBFloat16) return visit_operands<BFloat16>(run);
  run.template operator()<float>();
}

}  // namespace
}  // namespace seqkern::rnn

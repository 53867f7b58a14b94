// What CPU kernels that take time in chunks share: where the tokens of a call lie, and of a chunk the decays and the
// scores of its pairs of tokens.
//
// Arrays of a chunk are (tokens, row): token i of the chunk, in the order of time, is row i, rows are padded with zeros
// to whole vectors, and there is room for kChunk of them. g_t is the log decay of token t, c_i the sum of g_t over the
// tokens of the chunk up to i, and r_i what the reader i sees of it: c_i, or c_{i-1} where states are read before they
// change (read_previous).
#pragma once
#include "common/chunk_plan.h"
#include "common/gemm.h"
#include "common/rows.h"
#include "common/simd_math.h"
#include "common/tokens.h"

namespace seqkern {
namespace {

// Tokens [first, first + count) of a run, counted from 0 in the order of time.
struct Chunk {
  const Run* run;
  int64_t first, count;
};

// Where a walk goes on after value head h of `of` in a chunk; direction: 1 or -1.
struct Next {
  int64_t heads, chunks;  // ahead

  Next(int64_t of, int64_t h, int64_t direction) : heads(h + 1 < of ? 1 : 1 - of), chunks(h + 1 < of ? 0 : direction) {}
  explicit Next(int64_t direction) : heads(0), chunks(direction) {}
};

// ---- decays of a chunk and value head, a number per token

template <class A>
struct TokenDecays {
  A* g;            // whole vectors, 0 after the last token
  A *read, *left;  // exp(r_i), exp(c_C - c_j)
  A* total;        // exp(c_C), one number

  template <class Take>
  void allocate(const Take& take) {
    g = take(kChunk), read = take(kChunk), left = take(kChunk), total = take(1);
  }

  // read, left and total of g, whose sums never subtract: g may be -inf.
  void accumulate(int64_t count, bool read_previous) const {
    A sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const A before = sum;
      sum += g[i];
      read[i] = read_previous ? before : sum;
    }
    *total = exp_of_negative(splat(sum))[0];
    sum = 0;
    for (int64_t j = count - 1; j >= 0; --j) left[j] = sum, sum += g[j];
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      store<A>(read + i, exp_of_negative(load<A>(read + i)));
      store<A>(left + i, exp_of_negative(load<A>(left + i)));
    }
  }
};

// Calls body(i, j, decays, mask) for tokens i and vectors of tokens j, j + 1, ... with exp(r_i - c_j) and whether i
// reads what j adds to the state. Rows of exponents are running sums over i.
template <class A, class Body>
inline void for_each_decay(const A* g, int64_t count, bool read_previous, const Body& body) {
  Vec<A> lane{};
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = static_cast<A>(i);
  A sums[kChunk] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j <= i; j += kLanes<A>) {
      const Vec<A> i_of_lanes = splat(static_cast<A>(i - j)), before = load<A>(sums + j);
      const Vec<A> sum = select(lane < i_of_lanes, before + g[i], Vec<A>{});
      store<A>(sums + j, sum);
      if (read_previous)
        body(i, j, exp_of_negative(before), lane < i_of_lanes);
      else
        body(i, j, exp_of_negative(sum), lane <= i_of_lanes);
    }
  }
}

// ---- decays of a chunk and value head, a number per token and key

template <class A>
struct KeyDecays {
  A* step;   // (tokens, K): exp(g)
  A* read;   // (tokens, K): exp(r_i - c at the start of i's sub-chunk)
  A* left;   // (tokens, K): exp(c at the end of j's sub-chunk - c_j)
  A* total;  // (sub-chunks, K): exp(sum of g)

  template <class Take>
  void allocate(int64_t row, const Take& take) {
    step = take(kChunk * row), read = take(kChunk * row), left = take(kChunk * row);
    total = take(kChunk / kSubChunk * row);
  }

  // `step` holds g.
  void accumulate(int64_t count, int64_t row, bool read_previous) const {
    for (int64_t start = 0; start < count; start += kSubChunk) {
      const int64_t end = at_most(start + kSubChunk, count);
      for (int64_t k = 0; k < row; k += kLanes<A>) {
        Vec<A> sum{};
        for (int64_t j = end - 1; j >= start; --j) {
          store<A>(left + j * row + k, exp_of_negative(sum));
          sum += load<A>(step + j * row + k);
        }
        sum = Vec<A>{};
        for (int64_t i = start; i < end; ++i) {
          const Vec<A> g = load<A>(step + i * row + k), before = sum;
          sum += g;
          store<A>(read + i * row + k, exp_of_negative(read_previous ? before : sum));
          store<A>(step + i * row + k, exp_of_negative(g));
        }
        store<A>(total + start / kSubChunk * row + k, exp_of_negative(sum));
      }
    }
  }
};

// [scores] with decays per key among the tokens of one sub-chunk: directly, as a product of up to kSubChunk decays for
// each pair. q and step are (kSubChunk, row), kt (K, kSubChunk) has tokens as columns. scores (tokens, kChunk).
template <class A, bool kReadPrevious, int kFirst = 0>
inline void scores_of_sub_chunk(const A* q, const A* step, int64_t row, Right<A> kt, int64_t keys, int64_t count,
                                A* scores) {
  constexpr int kRows = static_cast<int>(kSubChunk) - kFirst;  // tokens that read tokens [kFirst, kFirst + kLanes)
  Vec<A> lane{}, sums[kRows] = {};
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = static_cast<A>(i);
  for (int64_t k = 0; k < keys; ++k) {
    const A *const of_q = q + kFirst * row + k, *const of_step = step + kFirst * row + k;
    Vec<A> decayed = load<A>(kt.data + k * kt.row + kFirst);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec<A> before = decayed;
      decayed = select(lane < static_cast<A>(i), before * of_step[i * row], before);
      sums[i] = madd(splat(of_q[i * row]), kReadPrevious ? before : decayed, sums[i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const Vec<A> zero{};
    const Vec<A> read = kReadPrevious ? select(lane < static_cast<A>(i), sums[i], zero)
                                      : select(lane <= static_cast<A>(i), sums[i], zero);
    if (kFirst + i < count) store<A>(scores + (kFirst + i) * kChunk + kFirst, read);
  }
  if constexpr (kFirst + kLanes<A> < kSubChunk) {
    if (kFirst + kLanes<A> < count)
      scores_of_sub_chunk<A, kReadPrevious, kFirst + kLanes<A>>(q, step, row, kt, keys, count, scores);
  }
}

// ---- a call

// T: operands of matrix products.
template <class T>
struct ChunkCall {
  using A = SumOf<T>;

  const Sequences& sequences;
  const int64_t keys;   // K
  const int64_t group;  // value heads of a key head
  const int64_t step = sequences.reverse ? -1 : 1;
  const int64_t key_row = padded<T>(keys);

  ChunkCall(const Sequences& sequences, int64_t heads, int64_t value_heads, int64_t keys)
      : sequences(sequences), keys(keys), group(value_heads / at_least(1, heads)) {}

  // From the chunk's first token and an element of it on; the next token is at step * x.l.
  int64_t offset(const TokenData& x, const Chunk& chunk, int64_t head, int64_t element = 0) const {
    const Run& run = *chunk.run;
    const int64_t token = sequences.reverse ? run.end - 1 - chunk.first : run.begin + chunk.first;
    return run.b * x.b + token * x.l + head * x.h + element;
  }

  // Elements [first, first + size) of tokens: rows of padded<T>(size).
  void load_tokens(const TokenData& x, const Chunk& chunk, int64_t head, int64_t first, int64_t size, A* rows) const {
    const int64_t row = padded<T>(size);
    visit_dtype(x.dtype, [&]<class X>() {
      const X* from = static_cast<const X*>(x.data) + offset(x, chunk, head, first);
      for (int64_t i = 0; i < chunk.count; ++i, from += step * x.l)
        for (int64_t j = 0; j < row; j += kLanes<A>)
          store<A>(rows + i * row + j, load<A>(from + j, static_cast<int>(at_most(size - j, kLanes<A>))));
    });
  }
  void store_tokens(const A* rows, const TokenData& x, const Chunk& chunk, int64_t head, int64_t first,
                    int64_t size) const {
    const int64_t row = padded<T>(size);
    visit_dtype(x.dtype, [&]<class X>() {
      X* to = static_cast<X*>(x.data) + offset(x, chunk, head, first);
      for (int64_t i = 0; i < chunk.count; ++i, to += step * x.l)
        for (int64_t j = 0; j < size; j += kLanes<A>)
          store<A>(to + j, load<A>(rows + i * row + j), static_cast<int>(at_most(size - j, kLanes<A>)));
    });
  }
  // The first `size` elements of each token in rows of `row`, the rest zeros; and a hint at what comes next: rows of
  // heads lie too far apart for the processor to foresee.
  void load_rows(const TokenData& x, const Chunk& here, int64_t head, int64_t size, int64_t row, const Next& next,
                 A* rows) const {
    visit_dtype(x.dtype, [&]<class X>() {
      constexpr int64_t kBytes = sizeof(X), kLine = 64;
      const int64_t ahead = (next.heads * x.h + next.chunks * kChunk * step * x.l) * kBytes;
      const X* from = static_cast<const X*>(x.data) + offset(x, here, head);
      for (int64_t i = 0; i < here.count; ++i, from += step * x.l, rows += row) {
        for (int64_t byte = 0; byte < size * kBytes; byte += kLine) prefetch_read(from, ahead + byte);
        for (int64_t j = 0; j < row; j += kLanes<A>)
          store<A>(rows + j, load<A>(from + j, static_cast<int>(at_least(0, at_most(size - j, kLanes<A>)))));
      }
    });
  }
  // `streamed`: past the caches, for tensors that are too large to be found in them again.
  void store_rows(const A* rows, int64_t row, const TokenData& x, const Chunk& here, int64_t head, int64_t size,
                  bool streamed) const {
    visit_dtype(x.dtype, [&]<class X>() {
      X* to = static_cast<X*>(x.data) + offset(x, here, head);
      for (int64_t i = 0; i < here.count; ++i, to += step * x.l, rows += row) {
        for (int64_t j = 0; j < size; j += kLanes<A>) {
          const int lanes = static_cast<int>(at_most(size - j, kLanes<A>));
          if (streamed && lanes == kLanes<A>)
            stream<A>(to + j, load<A>(rows + j));
          else
            store<A>(to + j, load<A>(rows + j), lanes);
        }
      }
    });
  }
  void load_numbers(const TokenData& x, const Chunk& chunk, int64_t head, A* to) const {
    visit_dtype(x.dtype, [&]<class X>() {
      convert(static_cast<const X*>(x.data) + offset(x, chunk, head), step * x.l, chunk.count, to);
    });
  }
  void store_numbers(const A* from, const TokenData& x, const Chunk& chunk, int64_t head) const {
    visit_dtype(x.dtype, [&]<class X>() {
      X* to = static_cast<X*>(x.data) + offset(x, chunk, head);
      for (int64_t i = 0; i < chunk.count; ++i, to += step * x.l) *to = narrow<X>(from[i]);
    });
  }

  // Room for operands from a `take` of sums.
  template <class Take>
  static T* take_operands(const Take& take, int64_t count) {
    return reinterpret_cast<T*>(take(ceil_div(count * static_cast<int64_t>(sizeof(T)), sizeof(A))));
  }

  // Products of pairs of tokens as far as j <= i, in whole sub-chunks: c (tokens, kChunk) = a b.
  static void multiply_lower(Left<T> a, Right<T> b, A* c, int64_t count, int64_t size) {
    for (int64_t i = 0; i < count; i += kSubChunk) {
      const int64_t rows = at_most(kSubChunk, count - i);
      multiply<T>({a.data + i * a.row, a.row, a.column}, b, c + i * kChunk, kChunk, rows, i + rows, size, false);
    }
  }

  // What scores_per_key packs operands into.
  struct Packed {
    T *q, *k;
    A* kt;  // (K, kSubChunk)

    template <class Take>
    void allocate(int64_t keys, const Take& take) {
      q = take_operands(take, left_room<T>(kSubChunk, keys));
      k = take_operands(take, right_room<T>(keys, kChunk));
      kt = take(right_room<A>(keys, kSubChunk));
    }
  };

  // [scores] of pairs j <= i with decays per key, of several readers in the place of q. On return a reader holds
  // exp(r_i) * x_i, and k holds exp(c_C - c_j) * k_j. Between sub-chunks both factors are anchored at the start of the
  // later one.
  struct Reader {
    A *x, *scores;  // (tokens, K), (tokens, kChunk)
  };
  template <int kReaders>
  void scores_per_key(const KeyDecays<A>& decays, int64_t count, bool read_previous, const Reader (&readers)[kReaders],
                      A* k, const Packed& packed) const {
    const int64_t row = key_row;
    for (int64_t start = 0; start < count; start += kSubChunk) {
      const int64_t tokens = at_most(kSubChunk, count - start);
      const A* const step = decays.step + start * row;
      const Right<A> kt = pack_right(k + start * row, 1, row, keys, tokens, packed.kt);
      Right<T> earlier = {};
      if (start > 0) earlier = pack_right(k, 1, row, keys, start, packed.k);
      for (const Reader& reader : readers) {
        A *const x = reader.x + start * row, *const scores = reader.scores + start * kChunk;
        if (read_previous)
          scores_of_sub_chunk<A, true>(x, step, row, kt, keys, tokens, scores + start);
        else
          scores_of_sub_chunk<A, false>(x, step, row, kt, keys, tokens, scores + start);
        multiply_row(decays.read + start * row, x, tokens * row, x);
        if (start > 0)
          multiply(pack_left(x, row, 1, tokens, keys, packed.q), earlier, scores, kChunk, tokens, start, keys, false);
        for (int64_t before = 0; before < start; before += kSubChunk)
          for (int64_t i = 0; i < tokens; ++i)
            multiply_row(decays.total + before / kSubChunk * row, x + i * row, row, x + i * row);
      }
      move_keys(decays, start, tokens, k);
    }
  }
  // From exp(c at the start of a sub-chunk - c_j) * k_j to the same at its end, which its own tokens join.
  void move_keys(const KeyDecays<A>& decays, int64_t start, int64_t tokens, A* k) const {
    const A* const total = decays.total + start / kSubChunk * key_row;
    for (int64_t j = 0; j < start; ++j) multiply_row(total, k + j * key_row, key_row, k + j * key_row);
    multiply_row(decays.left + start * key_row, k + start * key_row, tokens * key_row, k + start * key_row);
  }
  // exp(c_C - c_j) * k_j of a chunk, without scores.
  void keys_to_end(const KeyDecays<A>& decays, int64_t count, A* k) const {
    for (int64_t start = 0; start < count; start += kSubChunk)
      move_keys(decays, start, at_most(kSubChunk, count - start), k);
  }

  // ---- states: S (K, padded<T>(values)) of values [first, first + values) of (rows, K, size), contiguous

  void load_state(const Array& states, int64_t row, int64_t size, int64_t first, int64_t values, A* S) const {
    visit_dtype(states.dtype, [&]<class X>() {
      const X* const from = static_cast<const X*>(states.data) + row * keys * size + first;
      for (int64_t k = 0; k < keys; ++k) convert(from + k * size, 1, values, S + k * padded<T>(values));
    });
  }
  void store_state(const A* S, int64_t row, int64_t size, int64_t first, int64_t values, const Array& states) const {
    visit_dtype(states.dtype, [&]<class X>() {
      X* const to = static_cast<X*>(states.data) + row * keys * size + first;
      for (int64_t k = 0; k < keys; ++k) convert(S + k * padded<T>(values), 1, values, to + k * size);
    });
  }
};

}  // namespace
}  // namespace seqkern

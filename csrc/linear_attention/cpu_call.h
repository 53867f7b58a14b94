// What forward and backward share: where the tokens and states of a call lie, and of a chunk the gates, the decays and
// the scores. Internal to cpu.cpp.
//
// Arrays of a chunk are (tokens, row): token i of the chunk, in the order of time, is row i, rows are padded with zeros
// to whole vectors, and there is room for kChunk of them.
#pragma once
#include "common/gemm.h"
#include "common/simd_math.h"
#include "linear_attention/cpu_plan.h"

namespace seqkern::linear_attention {
namespace {

template <class A>
constexpr A kEmpty = -static_cast<A>(__builtin_inf());  // m of an empty state

// Tokens [first, first + count) of a run, counted from 0 in the order of time.
struct Chunk {
  const Run* run;
  int64_t first, count;
};

// ---- memory

template <class A>
inline void load_array(const Array& from, int64_t offset, int64_t count, A* to) {
  visit_dtype(from.dtype, [&]<class X>() { convert(static_cast<const X*>(from.data) + offset, 1, count, to); });
}
template <class A>
inline void store_array(const A* from, int64_t count, const Array& to, int64_t offset) {
  visit_dtype(to.dtype, [&]<class X>() { convert(from, 1, count, static_cast<X*>(to.data) + offset); });
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
// to[i] = the sum of the lanes of row(i), for i < count; whole vectors are written.
template <class A, class Row>
inline void sums_of_rows(int64_t count, A* to, const Row& row) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    Vec<A> rows[kLanes<A>];
    for (int j = 0; j < kLanes<A>; ++j) rows[j] = i + j < count ? row(i + j) : Vec<A>{};
    store<A>(to + i, sums_of_lanes<A>(rows));
  }
}

template <class A>
inline Vec<A> log_sigmoid(Vec<A> x) {
  const Vec<A> zero{}, magnitude = x < 0 ? -x : x;
  return select(x < 0, x, zero) - softplus(-magnitude);
}

// ---- [gate] of a chunk and value head, a number per token

template <class A>
struct TokenGates {
  A *g, *w;        // whole vectors, 0 after the last token
  A* f;            // log sigmoid(decay), of kExp
  A* m;            // m[0] enters the chunk, m[t + 1] belongs to token t; of kExp
  A *read, *left;  // exp(r_i), exp(c_C - c_j)
  A* total;        // exp(c_C), one number

  template <class Take>
  void allocate(const Take& take) {
    g = take(kChunk), w = take(kChunk), f = take(kChunk), m = take(kChunk + kWidestVector);
    read = take(kChunk), left = take(kChunk), total = take(1);
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

// ---- [gate] of a chunk and value head, with decays per key

template <class A>
struct KeyGates {
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
struct Call {
  using A = SumOf<T>;

  const Inputs& in;
  const int64_t step = in.sequences.reverse ? -1 : 1;
  const int64_t group = in.value_heads / at_least(1, in.heads);  // value heads of a key head
  const int64_t key_row = padded<T>(in.keys);
  const bool per_key = in.gates.form == Form::kKey;

  explicit Call(const Inputs& inputs) : in(inputs) {}

  // From the chunk's first token and an element of it on; the next token is at step * x.l.
  int64_t offset(const Data& x, const Chunk& chunk, int64_t head, int64_t element = 0) const {
    const Run& run = *chunk.run;
    const int64_t token = in.sequences.reverse ? run.end - 1 - chunk.first : run.begin + chunk.first;
    return run.b * x.b + token * x.l + head * x.h + element;
  }
  // In (B, L, HV), contiguous; the next token is at step * HV.
  int64_t number(const Chunk& chunk, int64_t head) const {
    return offset({nullptr, in.accumulator, in.sequences.length * in.value_heads, in.value_heads, 1}, chunk, head);
  }

  // Elements [first, first + size) of tokens: rows of padded<T>(size).
  void load_tokens(const Data& x, const Chunk& chunk, int64_t head, int64_t first, int64_t size, A* rows) const {
    const int64_t row = padded<T>(size);
    visit_dtype(x.dtype, [&]<class X>() {
      const X* from = static_cast<const X*>(x.data) + offset(x, chunk, head, first);
      for (int64_t i = 0; i < chunk.count; ++i, from += step * x.l)
        for (int64_t j = 0; j < row; j += kLanes<A>)
          store<A>(rows + i * row + j, load<A>(from + j, static_cast<int>(at_most(size - j, kLanes<A>))));
    });
  }
  void store_tokens(const A* rows, const Data& x, const Chunk& chunk, int64_t head, int64_t first, int64_t size) const {
    const int64_t row = padded<T>(size);
    visit_dtype(x.dtype, [&]<class X>() {
      X* to = static_cast<X*>(x.data) + offset(x, chunk, head, first);
      for (int64_t i = 0; i < chunk.count; ++i, to += step * x.l)
        for (int64_t j = 0; j < size; j += kLanes<A>)
          store<A>(to + j, load<A>(rows + i * row + j), static_cast<int>(at_most(size - j, kLanes<A>)));
    });
  }
  void load_numbers(const Data& x, const Chunk& chunk, int64_t head, A* to) const {
    visit_dtype(x.dtype, [&]<class X>() {
      convert(static_cast<const X*>(x.data) + offset(x, chunk, head), step * x.l, chunk.count, to);
    });
  }
  // [gate] of all forms but kKey; m[0] is what the chunk before has left.
  void load_gates(const Chunk& chunk, int64_t head, const TokenGates<A>& gates) const {
    const Gates& from = in.gates;
    const int64_t count = chunk.count;
    clear(gates.g, kChunk), fill(gates.w, kChunk, A{1});
    if (from.form == Form::kToken) load_numbers(from.decay, chunk, head, gates.g);
    if (from.form == Form::kDelta) load_delta(chunk, head, gates);
    if (from.form == Form::kExp) load_exponential(chunk, head, gates);
    for (int64_t i = count; i < round_up(count, kLanes<A>); ++i) gates.g[i] = 0, gates.w[i] = 0;
    gates.accumulate(count, in.read_previous);
  }
  void load_delta(const Chunk& chunk, int64_t head, const TokenGates<A>& gates) const {
    const Gates& from = in.gates;
    A of_head = 0, bias = 0;
    load_array(from.A, head, 1, &of_head);
    if (from.bias) load_array(from.bias, head, 1, &bias);
    const Vec<A> low = splat(static_cast<A>(from.low)), high = splat(static_cast<A>(from.high));
    load_numbers(from.decay, chunk, head, gates.w);
    for (int64_t i = 0; i < chunk.count; i += kLanes<A>) {
      Vec<A> delta = load<A>(gates.w + i) + bias;
      if (from.softplus) delta = softplus(delta);
      delta = delta < low ? low : delta > high ? high : delta;  // NaN stays
      store<A>(gates.w + i, delta);
      store<A>(gates.g + i, delta * of_head);
    }
  }
  void load_exponential(const Chunk& chunk, int64_t head, const TokenGates<A>& gates) const {
    load_numbers(in.gates.decay, chunk, head, gates.f);
    load_numbers(in.gates.input, chunk, head, gates.w);
    for (int64_t i = 0; i < chunk.count; i += kLanes<A>) store<A>(gates.f + i, log_sigmoid<A>(load<A>(gates.f + i)));
    A m = gates.m[0];
    for (int64_t i = 0; i < chunk.count; ++i) {
      const A kept = gates.f[i] + m, input = gates.w[i];
      gates.m[i + 1] = m = kept >= input || kept != kept ? kept : input;
    }
    for (int64_t i = 0; i < chunk.count; i += kLanes<A>) {
      const Vec<A> before = load<A>(gates.m + i), max = load<A>(gates.m + i + 1), zero{};
      const auto empty = max == kEmpty<A>;
      store<A>(gates.g + i, select(empty, zero, load<A>(gates.f + i) + before - max));
      store<A>(gates.w + i, select(empty, zero, exp_of_negative(load<A>(gates.w + i) - max)));
    }
  }
  void load_gates(const Chunk& chunk, int64_t head, const KeyGates<A>& gates) const {
    load_tokens(in.gates.decay, chunk, head, 0, in.keys, gates.step);
    gates.accumulate(chunk.count, key_row, in.read_previous);
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

  // [scores] P of products q_i . k_j.
  void decay_scores(const TokenGates<A>& gates, int64_t count, const A* products, A* scores) const {
    for_each_decay(gates.g, count, in.read_previous, [&](int64_t i, int64_t j, Vec<A> decays, auto mask) {
      const Vec<A> weighted = decays * load<A>(gates.w + j) * load<A>(products + i * kChunk + j);
      store<A>(scores + i * kChunk + j, select(mask, weighted, Vec<A>{}));
    });
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

  // [scores] P with decays per key. On return q holds exp(r_i) * q_i, and k holds exp(c_C - c_j) * k_j. Between
  // sub-chunks both factors are anchored at the start of the later one.
  void scores_per_key(const KeyGates<A>& gates, int64_t count, A* q, A* k, const Packed& packed, A* scores) const {
    const int64_t row = key_row;
    for (int64_t start = 0; start < count; start += kSubChunk) {
      const int64_t tokens = at_most(kSubChunk, count - start);
      A *const of_q = q + start * row, *const of_scores = scores + start * kChunk;
      const A* const step = gates.step + start * row;
      const Right<A> kt = pack_right(k + start * row, 1, row, in.keys, tokens, packed.kt);
      if (in.read_previous)
        scores_of_sub_chunk<A, true>(of_q, step, row, kt, in.keys, tokens, of_scores + start);
      else
        scores_of_sub_chunk<A, false>(of_q, step, row, kt, in.keys, tokens, of_scores + start);
      multiply_row(gates.read + start * row, of_q, tokens * row, of_q);
      if (start > 0)
        multiply(pack_left(of_q, row, 1, tokens, in.keys, packed.q), pack_right(k, 1, row, in.keys, start, packed.k),
                 of_scores, kChunk, tokens, start, in.keys, false);
      for (int64_t before = 0; before < start; before += kSubChunk)
        for (int64_t i = 0; i < tokens; ++i)
          multiply_row(gates.total + before / kSubChunk * row, of_q + i * row, row, of_q + i * row);
      move_keys(gates, start, tokens, k);
    }
  }
  // From exp(c at the start of a sub-chunk - c_j) * k_j to the same at its end, which its own tokens join.
  void move_keys(const KeyGates<A>& gates, int64_t start, int64_t tokens, A* k) const {
    const A* const total = gates.total + start / kSubChunk * key_row;
    for (int64_t j = 0; j < start; ++j) multiply_row(total, k + j * key_row, key_row, k + j * key_row);
    multiply_row(gates.left + start * key_row, k + start * key_row, tokens * key_row, k + start * key_row);
  }
  // exp(c_C - c_j) * k_j of a chunk, without scores.
  void keys_to_end(const KeyGates<A>& gates, int64_t count, A* k) const {
    for (int64_t start = 0; start < count; start += kSubChunk)
      move_keys(gates, start, at_most(kSubChunk, count - start), k);
  }

  // q_i . (bonus * k_i), which read_previous has on the diagonal of [scores].
  void multiply_bonus(const A* q, const A* k, const A* bonus, int64_t count, A* diagonal) const {
    sums_of_rows<A>(count, diagonal, [&](int64_t i) {
      Vec<A> sum{};
      for (int64_t j = 0; j < key_row; j += kLanes<A>)
        sum = madd(load<A>(q + i * key_row + j) * load<A>(bonus + j), load<A>(k + i * key_row + j), sum);
      return sum;
    });
  }
  void load_bonus(int64_t key_head, A* bonus) const {
    clear(bonus, key_row);
    if (in.bonus) load_array(in.bonus, key_head * in.keys, in.keys, bonus);
  }

  // ---- states: S (K, padded<T>(values)) of values [first, first + values), z (key_row), m

  // Row -1: an empty state.
  void load_state(const State& state, int64_t row, int64_t head, int64_t first, int64_t values, A* S, A* z,
                  A* m) const {
    const int64_t keys = in.keys, index = row * in.value_heads + head, to_row = padded<T>(values);
    clear(S, keys * to_row), clear(z, key_row);
    *m = kEmpty<A>;
    if (!state || row < 0) return;
    if (state.m) load_array(state.m, index, 1, m);
    if (state.m && *m == kEmpty<A>) return;  // whatever S and z hold
    visit_dtype(state.S.dtype, [&]<class X>() {
      const X* const from = static_cast<const X*>(state.S.data) + index * keys * in.size;
      if (in.value_major) return transpose_into<A>(from + first * keys, keys, values, keys, S, to_row);
      for (int64_t k = 0; k < keys; ++k) convert(from + k * in.size + first, 1, values, S + k * to_row);
    });
    if (state.z) load_array(state.z, index * keys, keys, z);
  }
  void store_state(const A* S, const A* z, const A* m, int64_t first, int64_t values, const State& state, int64_t row,
                   int64_t head) const {
    const int64_t keys = in.keys, index = row * in.value_heads + head, from_row = padded<T>(values);
    visit_dtype(state.S.dtype, [&]<class X>() {
      X* const to = static_cast<X*>(state.S.data) + index * keys * in.size;
      if (in.value_major) return transpose_into<A>(S, from_row, keys, values, to + first * keys, keys);
      for (int64_t k = 0; k < keys; ++k) convert(S + k * from_row, 1, values, to + k * in.size + first);
    });
    if (first > 0) return;
    if (state.z) store_array(z, keys, state.z, index * keys);
    if (state.m) store_array(m, 1, state.m, index);
  }
};

}  // namespace
}  // namespace seqkern::linear_attention

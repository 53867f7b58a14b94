// What forward, backward and step share: vectors of values, rows of numbers, and where tokens and states lie. Internal
// to cpu.cpp.
#pragma once
#include "common/parallel.h"
#include "common/simd_math.h"
#include "softmax_scan/cpu_plan.h"

namespace seqkern::softmax_scan {
namespace {

template <class A>
constexpr A kEmpty = -static_cast<A>(__builtin_inf());  // m of an empty state

// ---- values

template <class A>
constexpr int64_t whole_vectors(int64_t count) {
  return (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Calls body(i, lanes) for the vectors that make up `count` values, of which the last may have fewer of them than
// lanes.
template <class A, class Body>
[[gnu::always_inline]] inline void for_each_vector(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) body(i, kLanes<A>);
  if (i < count) body(i, static_cast<int>(count - i));
}

template <class A>
inline void clear(A* x, int64_t whole_vectors) {
  for (int64_t i = 0; i < whole_vectors; i += kLanes<A>) store<A>(x + i, Vec<A>{});
}
template <class A>
inline void load_array(const Array& from, int64_t offset, int64_t count, A* to) {
  visit_dtype(from.dtype, [&]<class T>() { convert(static_cast<const T*>(from.data) + offset, 1, count, to); });
}
template <class A>
inline void store_array(const A* from, int64_t count, const Array& to, int64_t offset) {
  visit_dtype(to.dtype, [&]<class T>() { convert(from, 1, count, static_cast<T*>(to.data) + offset); });
}

// ---- numbers

// Numbers of a token and head are arrays of (tokens, row). Heads that fill less than a vector lie packed: loops over a
// whole array always work on full vectors. Loops over one column of vectors write past the end of a row, into the next
// row, before that is written.
template <class A>
constexpr int64_t row_of(int64_t heads) {
  return heads < kLanes<A> ? heads : whole_vectors<A>(heads);
}
template <class A>
constexpr int64_t numbers_of(int64_t tokens, int64_t heads) {
  return tokens * row_of<A>(heads) + kLanes<A>;
}

// rows[t row + h] = from[t l + h stride]
template <class A, class T>
inline void load_rows(const T* from, int64_t l, int64_t stride, int64_t tokens, int64_t heads, A* rows) {
  const int64_t row = row_of<A>(heads);
  if (heads == 1) return convert(from, l, tokens, rows);
  for (int64_t t = 0; t < tokens; ++t, from += l, rows += row) {
    if (stride == 1)
      for_each_vector<A>(heads, [&](int64_t h, int lanes) { store<A>(rows + h, load<A>(from + h, lanes)); });
    else
      convert(from, stride, heads, rows);
  }
}

// [max] [sum] of a chunk, and what [sumv] and [out] multiply by. Row t + 1 of m and n belongs to token t, row 0 to the
// token before.
template <class A>
struct Weights {
  A *s, *m, *n;
  A *weight, *decay;  // exp(s_t - m_t), exp(m_{t-1} - m_t)
  A* inverse;         // 1 / n_t, 0 in an empty state

  template <class Take>
  void allocate(int64_t tokens, int64_t heads, const Take& take) {
    const int64_t numbers = numbers_of<A>(tokens, heads), with_before = numbers_of<A>(tokens + 1, heads);
    s = take(numbers), m = take(with_before), n = take(with_before);
    weight = take(numbers), decay = take(numbers), inverse = take(numbers);
  }

  void advance(int64_t tokens, int64_t heads) const {
    const int64_t row = row_of<A>(heads), numbers = tokens * row;
    for (int64_t h = 0; h < row; h += kLanes<A>) {
      Vec<A> max = load<A>(m + h);
      for (int64_t i = h; i < numbers; i += row) {
        const Vec<A> s_t = load<A>(s + i);
        max = select((s_t > max) | (s_t != s_t), s_t, max);  // [max] NaN comes, and stays
        store<A>(m + row + i, max);
      }
    }
    for (int64_t i = 0; i < numbers; i += kLanes<A>) {
      const Vec<A> max = load<A>(m + row + i), zero{};
      const auto empty = max == kEmpty<A>;
      store<A>(weight + i, select(empty, zero, exp_of_negative(load<A>(s + i) - max)));
      store<A>(decay + i, select(empty, zero, exp_of_negative(load<A>(m + i) - max)));
    }
    for (int64_t h = 0; h < row; h += kLanes<A>) {
      Vec<A> sum = load<A>(n + h);
      for (int64_t i = h; i < numbers; i += row) {
        sum = madd(load<A>(decay + i), sum, load<A>(weight + i));  // [sum]
        store<A>(n + row + i, sum);
      }
    }
    for (int64_t i = 0; i < numbers; i += kLanes<A>)
      store<A>(inverse + i, select(load<A>(m + row + i) == kEmpty<A>, Vec<A>{}, 1 / load<A>(n + row + i)));
  }

  // The last token becomes the one before.
  void pass_on(int64_t tokens, int64_t heads) const {
    const int64_t row = row_of<A>(heads);
    for (int64_t h = 0; h < row; h += kLanes<A>) {
      store<A>(m + h, load<A>(m + tokens * row + h));
      store<A>(n + h, load<A>(n + tokens * row + h));
    }
  }
};

// ---- a call

// T: elements of v. Tokens of a run are counted from 0 in the order of time.
template <class T>
struct Call {
  using A = Accumulator<T>;

  const Inputs& in;
  const int64_t step = in.sequences.reverse ? -1 : 1;
  const bool large = in.sequences.batch * in.sequences.length * in.heads * in.size * static_cast<int64_t>(sizeof(T)) >=
                     4 << 20;  // beyond a second-level cache

  explicit Call(const Inputs& inputs) : in(inputs) {}

  static int64_t num_tokens(const Block& block) { return block.run->end - block.run->begin; }
  int64_t token(const Block& block, int64_t k) const {
    return in.sequences.reverse ? block.run->end - 1 - k : block.run->begin + k;
  }

  // From token k and the first value of a block on; the next token is at step * x.l.
  T* values(const Data& x, const Block& block, int64_t k) const {
    return static_cast<T*>(x.data) + block.run->b * x.b + token(block, k) * x.l + block.head * x.h + block.value;
  }
  // As many elements from one token to a later one that it is time to fetch. Processors do not foresee rows of heads.
  int64_t ahead(const Data& x) const {
    const int64_t bytes = static_cast<int64_t>(sizeof(T)) * (x.l < 0 ? -x.l : x.l);
    return at_least(1, 4096 / at_least(1, bytes)) * step * x.l;
  }

  // Whole vectors of what is large go past the caches.
  void put(T* to, Vec<A> value, int lanes) const {
    if (large && lanes == kLanes<A>)
      stream<A>(to, value);
    else
      store<A>(to, value, lanes);
  }

  // From token k and the first head of a block on, in (B, L, H); the next token is at step * H.
  int64_t number(const Block& block, int64_t k) const {
    return (block.run->b * in.sequences.length + token(block, k)) * in.heads + block.head;
  }
  void load_scores(const Block& block, int64_t k, int64_t tokens, A* rows) const {
    const Data& s = in.s;
    const int64_t offset = block.run->b * s.b + token(block, k) * s.l + block.head * s.h;
    visit_dtype(s.dtype, [&]<class S>() {
      load_rows(static_cast<const S*>(s.data) + offset, step * s.l, s.h, tokens, block.heads, rows);
    });
  }

  // Of (rows, H).
  int64_t head_of_state(const Block& block, int64_t row) const { return row * in.heads + block.head; }

  // The state that enters a run: a row of m and n, and of w the values of each head, in whole vectors.
  void load_initial_state(const Block& block, A* m, A* n, A* w) const {
    const State& state = in.initial_state;
    const int64_t head = head_of_state(block, block.run->initial), width = whole_vectors<A>(block.values);
    const bool given = state && block.run->initial >= 0;
    if (given) load_array(state.m, head, block.heads, m), load_array(state.n, head, block.heads, n);
    clear(w, block.heads * width);
    for (int64_t h = 0; h < block.heads; ++h) {
      if (given && m[h] != kEmpty<A>)
        load_array(state.w, (head + h) * in.size + block.value, block.values, w + h * width);
      else
        m[h] = kEmpty<A>, n[h] = 0;
    }
  }
};

}  // namespace
}  // namespace seqkern::softmax_scan

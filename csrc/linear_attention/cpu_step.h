// One token. Internal to cpu.cpp.
//
// A state is read and written once. It lies in rows: values of a key or, with value_major, keys of a value. Vectors run
// along rows, of which several are moved on together.
#pragma once
#include "common/state_row.h"
#include "linear_attention/cpu_call.h"

namespace seqkern::linear_attention {
namespace {

template <class A>
struct Step {
  using Rows = StepParams::Rows;

  const StepParams& p;
  const int64_t rows = p.value_major ? p.size : p.keys, row_size = p.value_major ? p.keys : p.size;
  const int64_t stride_of_rows = p.value_major ? p.S.v : p.S.rows.i;
  const int64_t stride_in_row = p.value_major ? p.S.rows.i : p.S.v;
  const bool in_place = stride_in_row == 1;

  static constexpr int kTogether = kLanes<A> < 4 ? kLanes<A> : 4;  // rows
  static constexpr int64_t kGrain = 1 << 15;                       // numbers of states worth another thread
  static constexpr int64_t kPrefetchBytes = 2048;

  explicit Step(const StepParams& params) : p(params) {}

  struct Arrays {
    A *decays, *weights, *before, *maxima;   // of up to kLanes heads: exp(g), w, m of the state, m_t
    A *q, *k, *weighted, *decay, *z, *keys;  // of a head, whole vectors: weighted is w k, decay exp(g), keys any
    A *v, *n, *values;                       // likewise
    A* S;                                    // where a state is moved on whose rows have gaps

    template <class Take>
    void allocate(const Step& step, const Take& take) {
      const int64_t K = whole(step.p.keys), V = whole(step.p.size);
      decays = take(kLanes<A>), weights = take(kLanes<A>), before = take(kLanes<A>), maxima = take(kLanes<A>);
      q = take(K), k = take(K), weighted = take(K), decay = take(K), z = take(K), keys = take(K);
      v = take(V), n = take(V), values = take(V);
      S = take(step.in_place ? 0 : step.p.keys * step.p.size);
    }
  };

  void run() const {
    const int64_t size = at_least(1, p.keys * p.size);
    parallel_for(0, p.batch * p.value_heads, kGrain / size + 1, [&](int64_t begin, int64_t end) {
      const InScratch<A, Arrays> arrays(*this);
      while (begin < end) {
        const int64_t b = begin / p.value_heads, head = begin % p.value_heads;
        const int64_t heads = at_most(at_most(kLanes<A>, p.value_heads - head), end - begin);
        advance(b, head, heads, arrays);
        begin += heads;
      }
    });
  }

  void advance(int64_t b, int64_t head, int64_t heads, const Arrays& x) const {
    const int64_t row = state_row(p, b);
    if (row < 0) {
      clear(x.n, whole(p.size));
      for (int64_t h = head; h < head + heads; ++h) store_elements(x.n, p.y, b, h, p.size);
      return;
    }
    load_gates(b, row, head, heads, x);
    for (int64_t i = 0; i < heads; ++i) advance_head(b, row, head + i, i, x);
  }

  // ---- [gate]

  void load_gates(int64_t b, int64_t row, int64_t head, int64_t heads, const Arrays& x) const {
    Vec<A> decay = splat(A{1}), weight = decay;
    if (p.form == Form::kToken) decay = exp_of_negative(numbers(p.decay, b, head, heads));
    if (p.form == Form::kDelta) {
      weight = numbers(p.decay, b, head, heads);
      if (p.bias) weight += numbers(parameters(p.bias), 0, head, heads);
      if (p.softplus) weight = softplus(weight);
      const Vec<A> low = splat(static_cast<A>(p.low)), high = splat(static_cast<A>(p.high));
      weight = weight < low ? low : weight > high ? high : weight;  // NaN stays
      decay = exp_of_negative(weight * numbers(parameters(p.A), 0, head, heads));
    }
    if (p.form == Form::kExp) {
      const Vec<A> before = numbers(p.m, row, head, heads), input = numbers(p.input, b, head, heads), zero{};
      const Vec<A> kept = log_sigmoid<A>(numbers(p.decay, b, head, heads)) + before;
      const Vec<A> max = select((kept >= input) | (kept != kept), kept, input);
      store<A>(x.before, before), store<A>(x.maxima, max);
      store_strided(x.maxima, p.m, row * p.m.b + head * p.m.h, p.m.h, heads);
      const Vec<A> m = numbers(p.m, row, head, heads);  // as it is read back, which a 16-bit dtype rounds
      const auto empty = m == kEmpty<A>;
      store<A>(x.maxima, m);
      decay = select(empty, zero, exp_of_negative(kept - m));
      weight = select(empty, zero, exp_of_negative(input - m));
    }
    store<A>(x.decays, decay), store<A>(x.weights, weight);
  }

  // ---- one head, of which gates are the i-th

  void advance_head(int64_t b, int64_t row, int64_t head, int64_t i, const Arrays& x) const {
    const int64_t key_head = head / (p.value_heads / p.heads), K = whole(p.keys), V = whole(p.size);
    load_elements(p.q, b, key_head, p.keys, x.q);
    load_elements(p.k, b, key_head, p.keys, x.k);
    load_elements(p.v, b, head, p.size, x.v);
    scale_row(x.weights[i], x.k, K, x.weighted);
    fill(x.decay, K, x.decays[i]);
    if (p.form == Form::kKey) {
      load_elements(p.decay, b, head, p.keys, x.decay);
      for (int64_t k = 0; k < K; k += kLanes<A>) store<A>(x.decay + k, exp_of_negative(load<A>(x.decay + k)));
    }
    const bool empty = p.form == Form::kExp && x.before[i] == kEmpty<A>;  // whatever S and z hold
    A inner = 0;
    if (p.read_previous && p.bonus) {
      load_elements(parameters(p.bonus, p.keys, 1), 0, key_head, p.keys, x.keys);
      multiply_row(x.keys, x.k, K, x.keys);
      inner = sum_of_lanes<A>(dot_lanes(x.q, x.keys, K));
    }
    const A denominator = p.normalizer == Normalizer::kNone ? A{1} : normalize(row, head, i, empty, inner, x);
    visit_dtype(p.S.rows.dtype, [&]<class T>() {
      T* const S = static_cast<T*>(p.S.rows.data) + row * p.S.rows.b + head * p.S.rows.h;
      if (empty) clear_state(S);
      if (p.read_previous)
        advance_state<true>(S, x);
      else
        advance_state<false>(S, x);
    });
    if (p.read_previous) add_row(inner, x.v, V, x.n);
    write(b, head, static_cast<A>(p.scale) / denominator, x);
  }

  // [sum] [norm]: moves z on and returns d.
  A normalize(int64_t row, int64_t head, int64_t i, bool empty, A inner, const Arrays& x) const {
    const int64_t K = whole(p.keys);
    load_elements(p.z, row, head, p.keys, x.z);
    if (empty) clear(x.z, K);
    Vec<A> sum{};
    for (int64_t k = 0; k < K; k += kLanes<A>) {
      const Vec<A> before = load<A>(x.z + k), after = madd(load<A>(x.decay + k), before, load<A>(x.weighted + k));
      sum = madd(load<A>(x.q + k), p.read_previous ? before : after, sum);
      store<A>(x.z + k, after);
    }
    store_elements(x.z, p.z, row, head, p.keys);
    const A product = sum_of_lanes<A>(sum) + inner, eps = static_cast<A>(p.eps);
    if (p.normalizer == Normalizer::kSum) return product + eps;
    const A size = __builtin_fabs(static_cast<A>(p.scale) * product);
    const A least = static_cast<A>(__builtin_exp(-static_cast<double>(x.maxima[i])));  // inf in an empty state
    return (size > least || size != size ? size : least) + eps;
  }

  // [out] [skip]
  void write(int64_t b, int64_t head, A factor, const Arrays& x) const {
    const int64_t V = whole(p.size);
    scale_row(factor, x.n, V, x.n);
    if (p.skip) {
      load_elements(parameters(p.skip, p.skip_h, p.skip_v), 0, head, p.size, x.values);
      for (int64_t j = 0; j < V; j += kLanes<A>)
        store<A>(x.n + j, madd(load<A>(x.values + j), load<A>(x.v + j), load<A>(x.n + j)));
    }
    if (p.gate) {
      load_elements(p.gate, b, head, p.size, x.values);
      for (int64_t j = 0; j < V; j += kLanes<A>) store<A>(x.n + j, load<A>(x.n + j) * silu(load<A>(x.values + j)));
    }
    store_elements(x.n, p.y, b, head, p.size);
  }

  // ---- [state] [read]: S_t in place, and n, without scale, from S_t or S_{t-1}

  template <bool kReadPrevious, class T>
  void advance_state(T* S, const Arrays& x) const {
    if (in_place) return advance_rows<kReadPrevious>(S, stride_of_rows, x);
    for (int64_t i = 0; i < rows; ++i) convert(S + i * stride_of_rows, stride_in_row, row_size, x.S + i * row_size);
    advance_rows<kReadPrevious>(x.S, row_size, x);
    for (int64_t i = 0; i < rows; ++i) store_all(x.S + i * row_size, S + i * stride_of_rows, stride_in_row, row_size);
  }

  template <bool kReadPrevious, class T>
  void advance_rows(T* S, int64_t stride, const Arrays& x) const {
    int64_t i = 0;
    if (p.value_major) {
      for (; i < p.size; i += kLanes<A>) {
        Vec<A> sums[kLanes<A>] = {};
        const int64_t end = at_most(kLanes<A>, p.size - i);
        int64_t j = 0;
        for (; j + kTogether <= end; j += kTogether)
          advance_values<kReadPrevious, kTogether>(S + (i + j) * stride, stride, x.v + i + j, x, sums + j);
        for (; j < end; ++j) advance_values<kReadPrevious, 1>(S + (i + j) * stride, stride, x.v + i + j, x, sums + j);
        store<A>(x.n + i, sums_of_lanes<A>(sums));
      }
    } else {
      clear(x.n, whole(p.size));
      for (; i + kTogether <= p.keys; i += kTogether)
        advance_keys<kReadPrevious, kTogether>(S + i * stride, stride, i, x);
      for (; i < p.keys; ++i) advance_keys<kReadPrevious, 1>(S + i * stride, stride, i, x);
    }
  }

  // kRows rows of values, from that of a key on.
  template <bool kReadPrevious, int kRows, class T>
  void advance_keys(T* S, int64_t stride, int64_t key, const Arrays& x) const {
    for (int64_t j = 0; j < p.size; j += kLanes<A>) {
      const int lanes = static_cast<int>(at_most(kLanes<A>, p.size - j));
      const Vec<A> v = load<A>(x.v + j);
      Vec<A> n = load<A>(x.n + j);
      for (int r = 0; r < kRows; ++r) {
        T* const at = S + r * stride + j;
        prefetch_write(at, kPrefetchBytes);
        const Vec<A> before = load<A>(at, lanes), entering = splat(x.weighted[key + r]) * v;
        const Vec<A> after = madd(splat(x.decay[key + r]), before, entering);
        n = madd(splat(x.q[key + r]), kReadPrevious ? before : after, n);
        store<A>(at, after, lanes);
      }
      store<A>(x.n + j, n);
    }
  }

  // kRows rows of keys, from that of the value at v on; sums[r] is n by lanes.
  template <bool kReadPrevious, int kRows, class T>
  void advance_values(T* S, int64_t stride, const A* v, const Arrays& x, Vec<A>* sums) const {
    for (int64_t k = 0; k < p.keys; k += kLanes<A>) {
      const int lanes = static_cast<int>(at_most(kLanes<A>, p.keys - k));
      const Vec<A> decay = load<A>(x.decay + k), weighted = load<A>(x.weighted + k), q = load<A>(x.q + k);
      for (int r = 0; r < kRows; ++r) {
        T* const at = S + r * stride + k;
        prefetch_write(at, kPrefetchBytes);
        const Vec<A> before = load<A>(at, lanes), after = madd(decay, before, weighted * splat(v[r]));
        sums[r] = madd(q, kReadPrevious ? before : after, sums[r]);
        store<A>(at, after, lanes);
      }
    }
  }

  template <class T>
  void clear_state(T* S) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < row_size; ++j) S[i * stride_of_rows + j * stride_in_row] = T{};
  }

  // ---- memory

  static constexpr int64_t whole(int64_t count) { return round_up(count, kLanes<A>); }
  static Rows parameters(const Array& x, int64_t h = 1, int64_t i = 0) { return {x.data, x.dtype, 0, h, i}; }

  // Numbers of heads [head, head + heads) of row b.
  static Vec<A> numbers(const Rows& x, int64_t b, int64_t head, int64_t heads) {
    A lanes[kLanes<A>] = {};
    load_strided(x, b * x.b + head * x.h, x.h, heads, lanes);
    return load<A>(lanes);
  }
  // Elements of one head of row b, in whole vectors.
  static void load_elements(const Rows& x, int64_t b, int64_t head, int64_t count, A* to) {
    if (count > 0) store<A>(to + whole(count) - kLanes<A>, Vec<A>{});
    load_strided(x, b * x.b + head * x.h, x.i, count, to);
  }
  static void store_elements(const A* from, const Rows& x, int64_t b, int64_t head, int64_t count) {
    store_strided(from, x, b * x.b + head * x.h, x.i, count);
  }
};

}  // namespace
}  // namespace seqkern::linear_attention

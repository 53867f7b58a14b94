// The backward pass, from the last token to the first. Sums over the values of a head are taken in an order that
// depends on V alone. Internal to cpu.cpp.
#pragma once
#include "softmax_scan/cpu_call.h"

namespace seqkern::softmax_scan {
namespace {

template <class T>
struct Backward : Call<T> {
  using A = Accumulator<T>;
  using Call<T>::in, Call<T>::step;

  const BwdParams& p;
  const int64_t width = whole_vectors<A>(in.size);
  const int64_t v_ahead = this->ahead(in.v), o_ahead = this->ahead(p.o), do_ahead = this->ahead(p.do_);
  static constexpr int64_t kMaxHeads = 16;

  explicit Backward(const BwdParams& params) : Call<T>(params), p(params) {}

  struct Arrays {
    A *s, *ds;   // rows of the tokens of a chunk
    A *m, *n;    // the same; first, the row of the token before; last, that of the token after
    A *p, *r;    // p_t and r_t
    A* sums;     // (tokens, row, kLanes): v_t . G_t - R_t, whose lanes are yet to be added
    A* G;        // (heads, values in whole vectors)
    A* R;        // (heads, kLanes), whose lanes are yet to be added
    A* e;        // a row: the gradient of the maximum, until it has found its token
    A *m0, *n0;  // rows of the initial state
    A* w0;       // (heads, values in whole vectors)

    template <class Take>
    void allocate(const Backward& call, const Take& take) {
      const int64_t heads = heads_of_block(call.in, kMaxHeads), numbers = numbers_of<A>(kChunk, heads);
      s = take(numbers), ds = take(numbers), p = take(numbers), r = take(numbers);
      m = take(numbers_of<A>(kChunk + 2, heads)), n = take(numbers_of<A>(kChunk + 2, heads));
      sums = take(numbers * kLanes<A>);
      G = take(heads * call.width), R = take(heads * kLanes<A>);
      e = take(numbers_of<A>(1, heads)), m0 = take(numbers_of<A>(1, heads)), n0 = take(numbers_of<A>(1, heads));
      w0 = take(heads * call.width);
    }
  };

  void run() const {
    const int64_t tokens = in.sequences.batch * in.sequences.length / at_least(1, in.num_runs);
    const int64_t work = at_least(1, tokens * in.size);
    parallel_for(0, in.num_runs * in.heads, kGrain / work + 1, [&](int64_t begin, int64_t end) {
      const InScratch<A, Arrays> arrays(*this);
      for_each_block(in, 1, kMaxHeads, begin, end, [&](const Block& block) { differentiate(block, arrays); });
      finish_streams();
    });
  }

  void differentiate(const Block& block, const Arrays& a) const {
    const int64_t tokens = this->num_tokens(block);
    const bool to_initial = p.dinitial_state && block.run->initial >= 0;
    const bool from_final = p.dfinal_state && block.run->final >= 0;
    if (block.run->padding) return clear_gradients(block);
    this->load_initial_state(block, a.m0, a.n0, a.w0);
    if (tokens == 0) {
      if (to_initial && from_final) pass_gradient(block, a);
      return;
    }
    clear(a.G, block.heads * width);
    clear(a.R, block.heads * kLanes<A>);
    if (from_final) load_dfinal(block, a);
    for (int64_t k = (tokens - 1) / kChunk * kChunk; k >= 0; k -= kChunk) {
      const int64_t count = at_most(kChunk, tokens - k);
      load_chunk(block, k, count, a);
      differentiate_values(block, k, count, a);
      add_lanes(block, count, a);
      if (from_final) add_gradient_of_max(block, count, a);
      store_ds(block, k, count, a);
    }
    if (to_initial) store_dinitial(block, from_final, a);
  }

  // After the last token: dw as G, -dn as R, and e.
  void load_dfinal(const Block& block, const Arrays& a) const {
    const State& dfinal = p.dfinal_state;
    const int64_t head = this->head_of_state(block, block.run->final), last = this->num_tokens(block) - 1;
    const T* const o = this->values(p.o, block, last);
    load_normalizers(block, last, 1, a.m, a.n);
    for (int64_t h = 0; h < block.heads; ++h) {
      A* const dw = a.G + h * width;
      load_array(dfinal.w, (head + h) * in.size, in.size, dw);
      Vec<A> sum{};
      for_each_vector<A>(
          in.size, [&](int64_t j, int lanes) { sum = madd(load<A>(dw + j), load<A>(o + h * p.o.h + j, lanes), sum); });
      const A dm = static_cast<const A*>(dfinal.m.data)[head + h], dn = static_cast<const A*>(dfinal.n.data)[head + h];
      a.R[h * kLanes<A>] = -dn;
      a.e[h] = dm - a.n[h] * (dn + sum_of_lanes<A>(sum));  // w = n o
    }
  }

  // The scores of a chunk; p_t and r_t.
  void load_chunk(const Block& block, int64_t k, int64_t count, const Arrays& a) const {
    const int64_t row = row_of<A>(block.heads), tokens = this->num_tokens(block);
    const int64_t first = at_least(0, k - 1), end = at_most(k + count + 1, tokens);
    this->load_scores(block, k, count, a.s);
    if (k == 0) convert(a.m0, 1, block.heads, a.m);
    load_normalizers(block, first, end - first, a.m + (first - k + 1) * row, a.n + (first - k + 1) * row);
    for (int64_t i = 0; i < count * row; i += kLanes<A>) {
      const Vec<A> m = load<A>(a.m + row + i), n = load<A>(a.n + row + i), zero{};
      const Vec<A> m_after = load<A>(a.m + 2 * row + i), n_after = load<A>(a.n + 2 * row + i);
      const auto empty = m == kEmpty<A>;
      store<A>(a.p + i, select(empty, zero, exp_of_negative(load<A>(a.s + i) - m) / n));
      store<A>(a.r + i, select(empty, zero, exp_of_negative(m - m_after) * (n / n_after)));
    }
    if (k + count == tokens) convert(a.n + count * row, 1, block.heads, a.r + (count - 1) * row);
  }

  void load_normalizers(const Block& block, int64_t k, int64_t tokens, A* m, A* n) const {
    const int64_t row = row_of<A>(block.heads);
    for (int64_t t = 0; t < tokens; ++t) {
      const A* const from = static_cast<const A*>(p.normalizers) + 2 * this->number(block, k + t);
      for (int64_t h = 0; h < block.heads; ++h) m[t * row + h] = from[2 * h], n[t * row + h] = from[2 * h + 1];
    }
  }

  void differentiate_values(const Block& block, int64_t k, int64_t count, const Arrays& a) const {
    const int64_t row = row_of<A>(block.heads);
    for (int64_t t = count; t-- > 0;) {
      const T *const v = this->values(in.v, block, k + t), *const o = this->values(p.o, block, k + t);
      const T* const dout = this->values(p.do_, block, k + t);
      T* const dv = this->values(p.dv, block, k + t);
      for (int64_t h = 0; h < block.heads; ++h)
        differentiate_token(v + h * in.v.h, o + h * p.o.h, dout + h * p.do_.h, dv + h * p.dv.h, a, h, t * row + h);
    }
  }

  // The values of a token and of head h of the block, whose numbers are the i-th.
  void differentiate_token(const T* v, const T* o, const T* dout, T* dv, const Arrays& a, int64_t h, int64_t i) const {
    const Vec<A> p_t = splat(a.p[i]), r_t = splat(a.r[i]);
    A *const G = a.G + h * width, *const R = a.R + h * kLanes<A>;
    Vec<A> do_o{}, v_G{};
    for_each_vector<A>(in.size, [&](int64_t j, int lanes) {
      prefetch_read(v + j - v_ahead, 0);
      prefetch_read(o + j - o_ahead, 0);
      prefetch_read(dout + j - do_ahead, 0);
      const Vec<A> do_t = load<A>(dout + j, lanes);
      const Vec<A> G_t = madd(r_t, load<A>(G + j), do_t);  // [dout]
      store<A>(G + j, G_t);
      this->put(dv + j, p_t * G_t, lanes);  // [dv]
      do_o = madd(do_t, load<A>(o + j, lanes), do_o);
      v_G = madd(load<A>(v + j, lanes), G_t, v_G);
    });
    const Vec<A> R_t = madd(r_t, load<A>(R), do_o);  // [dsum]
    store<A>(R, R_t);
    store<A>(a.sums + i * kLanes<A>, v_G - R_t);
  }

  void add_lanes(const Block& block, int64_t count, const Arrays& a) const {
    for (int64_t i = 0; i < count * row_of<A>(block.heads); i += kLanes<A>) {
      Vec<A> rows[kLanes<A>];
      for (int j = 0; j < kLanes<A>; ++j) rows[j] = load<A>(a.sums + (i + j) * kLanes<A>);
      const Vec<A> ds = load<A>(a.p + i) * sums_of_lanes<A>(rows);  // [ds]
      store<A>(a.ds + i, select(load<A>(a.s + i) == kEmpty<A>, Vec<A>{}, ds));
    }
  }

  // To the last token that raised m, which is the first that has the final m.
  void add_gradient_of_max(const Block& block, int64_t count, const Arrays& a) const {
    const int64_t row = row_of<A>(block.heads);
    for (int64_t t = count; t-- > 0;) {
      for (int64_t h = 0; h < block.heads; ++h) {
        const int64_t i = t * row + h;
        if (a.m[i] < a.m[i + row]) a.ds[i] += a.e[h], a.e[h] = 0;
      }
    }
  }

  void store_ds(const Block& block, int64_t k, int64_t count, const Arrays& a) const {
    const int64_t row = row_of<A>(block.heads);
    visit_dtype(p.ds.dtype, [&]<class S>() {
      for (int64_t t = 0; t < count; ++t) {
        S* const ds = static_cast<S*>(p.ds.data) + this->number(block, k + t);
        for_each_vector<A>(block.heads,
                           [&](int64_t h, int lanes) { store<A>(ds + h, load<A>(a.ds + t * row + h), lanes); });
      }
    });
  }

  // Rows 1 of m and n belong to the first token. A state that was empty has no gradient.
  void store_dinitial(const Block& block, bool from_final, const Arrays& a) const {
    const State& dinitial = p.dinitial_state;
    const int64_t head = this->head_of_state(block, block.run->initial), row = row_of<A>(block.heads);
    for (int64_t h = 0; h < block.heads; ++h) {
      if (a.m0[h] == kEmpty<A>) continue;
      const A q = exp_of_negative(splat(a.m0[h] - a.m[row + h]))[0] / a.n[row + h];
      A* const dw = a.G + h * width;
      Vec<A> sum{};
      for (int64_t j = 0; j < width; j += kLanes<A>) {
        const Vec<A> dw_j = q * load<A>(dw + j);
        store<A>(dw + j, dw_j);
        sum = madd(load<A>(a.w0 + h * width + j), dw_j, sum);
      }
      const A dn = -q * sum_of_lanes<A>(load<A>(a.R + h * kLanes<A>));
      const A dm = a.n0[h] * dn + sum_of_lanes<A>(sum) + (from_final ? a.e[h] : 0);
      store_array(&dm, 1, dinitial.m, head + h);
      store_array(&dn, 1, dinitial.n, head + h);
      store_array(dw, in.size, dinitial.w, (head + h) * in.size);
    }
  }

  // Of a run without tokens, which the state passed through.
  void pass_gradient(const Block& block, const Arrays& a) const {
    const State &dfinal = p.dfinal_state, &dinitial = p.dinitial_state;
    const int64_t to = this->head_of_state(block, block.run->initial);
    const int64_t from = this->head_of_state(block, block.run->final);
    const auto pass = [](const Array& x, int64_t from, int64_t count, const Array& y, int64_t to) {
      store_array(static_cast<const A*>(x.data) + from, count, y, to);
    };
    for (int64_t h = 0; h < block.heads; ++h) {
      if (a.m0[h] == kEmpty<A>) continue;
      pass(dfinal.m, from + h, 1, dinitial.m, to + h);
      pass(dfinal.n, from + h, 1, dinitial.n, to + h);
      pass(dfinal.w, (from + h) * in.size, in.size, dinitial.w, (to + h) * in.size);
    }
  }

  void clear_gradients(const Block& block) const {
    for (int64_t k = 0; k < this->num_tokens(block); ++k) {
      T* const dv = this->values(p.dv, block, k);
      for (int64_t h = 0; h < block.heads; ++h)
        __builtin_memset(dv + h * p.dv.h, 0, static_cast<size_t>(in.size) * sizeof(T));
      const int64_t size = size_of(p.ds.dtype);
      __builtin_memset(static_cast<char*>(p.ds.data) + this->number(block, k) * size, 0,
                       static_cast<size_t>(block.heads * size));
    }
  }
};

}  // namespace
}  // namespace seqkern::softmax_scan

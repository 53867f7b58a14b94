// One token. Internal to cpu.cpp.
#pragma once
#include "common/rows.h"
#include "common/state_row.h"
#include "softmax_scan/cpu_call.h"

namespace seqkern::softmax_scan {
namespace {

template <class A>
struct Step {
  using Rows = StepParams::Rows;

  const StepParams& p;
  static constexpr int64_t kMaxHeads = 64;

  struct Arrays : Weights<A> {
    A* unit;       // exp(m_t - m_t as it is kept): what n and w are kept in
    A *v, *w, *o;  // of one head: values in whole vectors

    template <class Take>
    void allocate(const Step& call, const Take& take) {
      const int64_t width = whole_vectors<A>(call.p.size);
      const int64_t heads = at_most(kMaxHeads, call.p.heads);
      Weights<A>::allocate(1, heads, take);
      unit = take(numbers_of<A>(1, heads));
      v = take(width), w = take(width), o = take(width);
    }
  };

  void run() const {
    parallel_for(0, p.batch * p.heads, kGrain / at_least(1, p.size) + 1, [&](int64_t begin, int64_t end) {
      const InScratch<A, Arrays> arrays(*this);
      while (begin < end) {
        const int64_t b = begin / p.heads, head = begin % p.heads;
        const int64_t heads = at_most(at_most(kMaxHeads, p.heads - head), end - begin);
        advance(b, head, heads, arrays);
        begin += heads;
      }
    });
  }

  void advance(int64_t b, int64_t head, int64_t heads, const Arrays& a) const {
    const int64_t row = state_row(p, b);
    if (row < 0) {
      clear(a.o, whole_vectors<A>(p.size));
      for (int64_t h = head; h < head + heads; ++h) store_values(a.o, p.o, b, h);
      return;
    }
    load_numbers(p.s, b, head, heads, a.s);
    load_numbers(p.m, row, head, heads, a.m);
    load_numbers(p.n, row, head, heads, a.n);
    for (int64_t h = 0; h < heads; ++h)
      if (a.m[h] == kEmpty<A>) a.n[h] = 0;
    a.advance(1, heads);
    store_numbers(a.m + row_of<A>(heads), p.m, row, head, heads);
    fill_units(row, head, heads, a);
    for (int64_t h = 0; h < heads; ++h) advance_values(b, row, head, h, a);
    for (int64_t h = 0; h < heads; ++h) a.n[row_of<A>(heads) + h] *= a.unit[h];
    store_numbers(a.n + row_of<A>(heads), p.n, row, head, heads);
  }

  // n and w belong to the m that is read back, which a 16-bit dtype rounds.
  void fill_units(int64_t row, int64_t head, int64_t heads, const Arrays& a) const {
    const A* const m = a.m + row_of<A>(heads);
    load_numbers(p.m, row, head, heads, a.unit);
    for (int64_t h = 0; h < row_of<A>(heads); h += kLanes<A>) {
      const Vec<A> exact = load<A>(m + h), kept = load<A>(a.unit + h), one = splat(A{1});
      store<A>(a.unit + h, select(exact == kept, one, exp2((exact - kept) * kLog2E<A>)));
    }
  }

  void advance_values(int64_t b, int64_t row, int64_t head, int64_t h, const Arrays& a) const {
    const Vec<A> weight = splat(a.weight[h]), decay = splat(a.decay[h]), inverse = splat(a.inverse[h]), zero{};
    const Vec<A> unit = splat(a.unit[h]);
    const bool absent = a.s[h] == kEmpty<A>, empty = a.m[h] == kEmpty<A>;  // whatever v, or w, is
    load_values(p.v, b, head + h, a.v);
    load_values(p.w, row, head + h, a.w);
    for (int64_t j = 0; j < p.size; j += kLanes<A>) {
      const Vec<A> entering = absent ? zero : weight * load<A>(a.v + j);
      const Vec<A> sum = madd(decay, empty ? zero : load<A>(a.w + j), entering);  // [sumv]
      store<A>(a.w + j, sum * unit);
      store<A>(a.o + j, sum * inverse);  // [out]
    }
    store_values(a.w, p.w, row, head + h);
    store_values(a.o, p.o, b, head + h);
  }

  // Numbers of heads [head, head + heads), and values of one head, of row b.
  static void load_numbers(const Rows& x, int64_t b, int64_t head, int64_t heads, A* to) {
    load_strided(x, b * x.b + head * x.h, x.h, heads, to);
  }
  static void store_numbers(const A* from, const Rows& x, int64_t b, int64_t head, int64_t heads) {
    store_strided(from, x, b * x.b + head * x.h, x.h, heads);
  }
  void load_values(const Rows& x, int64_t b, int64_t head, A* to) const {
    load_strided(x, b * x.b + head * x.h, x.v, p.size, to);
  }
  void store_values(const A* from, const Rows& x, int64_t b, int64_t head) const {
    store_strided(from, x, b * x.b + head * x.h, x.v, p.size);
  }
};

}  // namespace
}  // namespace seqkern::softmax_scan

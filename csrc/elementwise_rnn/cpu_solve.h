// What the forwards by iteration share. A channel whose estimate is not within the tolerance is computed serially in
// the end. Each channel goes its own way: once it is accepted nothing of it changes, so its result does not depend on
// its neighbours. Internal to cpu.cpp.
#pragma once
#include "elementwise_rnn/cpu_fwd.h"

namespace seqkern::elementwise_rnn {
namespace {

// Matrices, as rows one after another.
template <class A, int kS>
[[gnu::always_inline]] inline void load_vectors(const A* rows, int64_t pitch, Vec<Accumulator<A>> (&to)[kS][kS]) {
  for (int i = 0; i < kS; ++i) load_vectors<A>(rows + i * kS * pitch, pitch, to[i]);
}
template <class A, int kS>
[[gnu::always_inline]] inline void store_vectors(const Vec<A> (&from)[kS][kS], A* rows, int64_t pitch) {
  for (int i = 0; i < kS; ++i) store_vectors<A>(from[i], rows + i * kS * pitch, pitch);
}

template <class V>
using Mask = decltype(V{} < V{});

template <class V>
inline V magnitude(V x) {
  return select(x < 0, -x, x);
}
// The larger, or NaN where one is.
template <class V>
inline V larger(V x, V y) {
  return select((x > y) | (x != x), x, y);
}
// x - y, and 0 where they are equal: inf too.
template <class V>
inline V change(V x, V y) {
  return select(x == y, V{}, x - y);
}
// a x + y where x is not 0, else y: whatever a is.
template <class V>
inline V madd_nonzero(V a, V x, V y) {
  return select(x == 0, y, madd(a, x, y));
}
// After the matrix a, as magnitudes: |a| e.
template <class V, int kS>
inline void amplify(const V (&a)[kS][kS], const V (&e)[kS], V (&to)[kS]) {
  for (int i = 0; i < kS; ++i) {
    to[i] = V{};
    for (int j = 0; j < kS; ++j) to[i] = madd_nonzero(magnitude(a[i][j]), e[j], to[i]);
  }
}
// Where any of them is not 0.
template <class V, int kS>
inline Mask<V> any_error(const V (&e)[kS]) {
  Mask<V> any = e[0] != 0;
  for (int i = 1; i < kS; ++i) any |= e[i] != 0;
  return any;
}
// [correct] What f becomes when the state that it follows from changes by delta: f + M delta, or f if that is not
// finite.
template <class V, int kS>
inline void correct(const V (&M)[kS][kS], const V (&delta)[kS], const V (&f)[kS], V (&to)[kS]) {
  for (int i = 0; i < kS; ++i) {
    V sum = f[i];
    for (int j = 0; j < kS; ++j) sum = madd_nonzero(M[i][j], delta[j], sum);
    to[i] = select(sum - sum == 0, sum, f[i]);
  }
}

template <class C, class A>
struct Iterative : Forward<C, A> {
  using Base = Forward<C, A>;
  using Base::in, Base::width, Base::L, Base::kG, Base::kW, Base::kS, Base::p;
  using typename Base::V;

  const int64_t max_sweeps;

  Iterative(const FwdParams& params, int64_t width, int64_t default_sweeps)
      : Base(params, width), max_sweeps(p.max_sweeps > 0 ? p.max_sweeps : default_sweeps) {}

  // Whether the estimated errors e of a state s are accepted. Beside inf there is no size to compare with.
  Mask<V> tolerates(const V (&e)[kS], const V (&s)[kS]) const {
    Mask<V> all = ~Mask<V>{};
    for (int i = 0; i < kS; ++i) {
      const V size = magnitude(s[i]);
      const V scale = select((size > 1) & (size - size == 0), size, V{} + 1);
      const V tolerance =
          p.atol < 0 ? static_cast<A>(tolerance_of(in.accumulator)) * scale : V{} + static_cast<A>(p.atol);
      all &= e[i] <= static_cast<A>(kAccepted) * tolerance;  // false for NaN
    }
    return all;
  }

  // What rounding adds to a state.
  V rounding(V s) const { return static_cast<A>(rounding_of(in.accumulator)) * magnitude(s); }

  static V largest(const V (&e)[kS], V so_far) {
    for (int i = 0; i < kS; ++i) so_far = larger(e[i], so_far);
    return so_far;
  }

  // Calls body(run, from, to) for the runs of positions [q, end) of row b, in processing order.
  template <class Body>
  void for_each_run(int64_t b, int64_t q, int64_t end, const Body& body) const {
    const bool reverse = in.sequences.reverse;
    const int64_t low = reverse ? L - end : q, high = reverse ? L - q : end;
    int64_t first = first_run(in, b * L + low);
    const int64_t last = first_run(in, b * L + high);
    if (first > 0 && in.runs[first - 1].b == b && in.runs[first - 1].end > low) --first;
    for (int64_t i = first; i < last; ++i) {
      const Run& run = in.runs[reverse ? last - 1 - (i - first) : i];
      body(run, at_least(q, this->first(run)), at_most(end, this->last(run)));
    }
  }

  void store_final_state(const Run& run, int64_t end, A* s, const Block& block, const A* marked = nullptr) const {
    if (p.final_state && run.final >= 0 && end == this->last(run))
      this->store_state(s, p.final_state, in.sequences.count, run.final, block, marked);
  }

  // Positions from q on of the channels that are marked; a.s is the state before them, unless a run begins there.
  void repair(int64_t b, int64_t q, const Block& block, const typename Base::Arrays& a, const A* marked) const {
    for_each_run(b, q, L, [&](const Run& run, int64_t from, int64_t to) {
      if (from == this->first(run)) this->load_initial_state(run, block, a.s);
      this->advance(b, from, to, block, a, marked);
      store_final_state(run, to, a.s, block, marked);
    });
  }

  void store_stats(int64_t b, const Block& block, const A* sweeps, const A* estimate, const A* repaired) const {
    for (int64_t d = 0; d < block.count; ++d) {
      const int64_t i = b * in.channels + block.first + d;
      if (p.stats.sweeps) p.stats.sweeps[i] = static_cast<int32_t>(sweeps[d]);
      if (p.stats.estimate) p.stats.estimate[i] = static_cast<float>(estimate[d]);
      if (p.stats.repaired) p.stats.repaired[i] = repaired[d] != 0;
    }
  }
  static bool any(const A* marked, const Block& block) {
    for (int64_t d = 0; d < block.count; ++d)
      if (marked[d] != 0) return true;
    return false;
  }
};

}  // namespace
}  // namespace seqkern::elementwise_rnn

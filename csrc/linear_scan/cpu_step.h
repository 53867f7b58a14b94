// One new token per batch row against states that are updated in place. Internal to cpu.cpp.
#pragma once
#include "common/parallel.h"
#include "common/state_row.h"
#include "linear_scan/cpu_plan.h"
#include "linear_scan/cpu_rows.h"

namespace seqkern::linear_scan {
namespace {

template <class F>
struct Step {
  using A = typename F::A;
  using Rows = StepParams::Rows;
  static constexpr int64_t kStrip = 16 * F::kUnit;  // elements that are worked on together

  const StepParams& p;
  const int64_t elements = p.channels * F::kParts, strips = ceil_div(elements, kStrip);

  void run() const {
    parallel_for(0, p.batch * strips, kStepGrain / kStrip, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) advance(item / strips, item % strips * kStrip);
    });
  }

  void advance(int64_t b, int64_t first) const {
    const int64_t count = at_most(kStrip, elements - first), row = state_row(p, b);
    A states[kStrip], decays[kStrip], inputs[kStrip];
    if (row < 0) {
      for (A& h : states) h = 0;
      return store(states, p.h, b, first, count);
    }
    const A* const h = load(p.state, row, first, count, states);
    const A* const a = load(p.a, b, first, count, decays);
    const A* const x = load(p.b, b, first, count, inputs);
    for_each_unit<F>({1, count}, [&](int64_t u, auto size) {
      const int64_t i = u * F::kUnit;
      const auto a_t = F::load(a + i, size);
      // [decay] [state]
      F::store(states + i, madd(p.log_space ? exp(a_t) : a_t, F::load(h + i, size), F::load(x + i, size)));
    });
    store(states, p.state, row, first, count);
    store(states, p.h, b, first, count);
  }

  // Elements of a row: where they lie, or else gathered.
  static const A* load(const Rows& from, int64_t row, int64_t first, int64_t count, A* gathered) {
    const A* in_place = gathered;
    visit_dtype(from.dtype, [&]<class T>() {
      const T* const data = static_cast<const T*>(from.data) + row * from.b * F::kParts;
      if (from.d == 1) {
        if constexpr (kSame<T, A>)
          in_place = data + first;
        else
          convert(data + first, 1, count, gathered);
      } else {
        for (int64_t i = 0; i < count; ++i)
          gathered[i] = static_cast<A>(widen(data[(first + i) / F::kParts * from.d * F::kParts + i % F::kParts]));
      }
    });
    return in_place;
  }
  static void store(const A* from, const Rows& to, int64_t row, int64_t first, int64_t count) {
    visit_dtype(to.dtype, [&]<class T>() {
      T* const data = static_cast<T*>(to.data) + row * to.b * F::kParts;
      if (to.d == 1) return convert(from, 1, count, data + first);
      for (int64_t i = 0; i < count; ++i)
        data[(first + i) / F::kParts * to.d * F::kParts + i % F::kParts] = narrow<T>(from[i]);
    });
  }

  static constexpr int64_t kStepGrain = 1 << 15;  // elements worth another thread
};

}  // namespace
}  // namespace seqkern::linear_scan

// The recurrence over the tokens of a tile, whose rows lie in memory in any data type. Internal to cpu.cpp.
#pragma once
#include "linear_scan/cpu_number.h"

namespace seqkern::linear_scan {
namespace {

// One row of numbers per token, in processing order.
template <class T>
struct Rows {
  T* data;
  int64_t step, unit;  // elements to the next token, and to the next unit of channels (0: all units are alike)

  T* at(int64_t token, int64_t u) const { return data + token * step + u * unit; }
};

// (tokens, elements)
struct Extent {
  int64_t tokens, elements;
};

// Calls body(u, size) for units of elements.
template <class F, class Body>
[[gnu::always_inline]] inline void for_each_unit(const Extent& extent, const Body& body) {
  const int64_t whole = extent.elements / F::kUnit;
  for (int64_t u = 0; u < whole; ++u) body(u, Whole{});
  if (const int rest = static_cast<int>(extent.elements % F::kUnit)) body(whole, Part{rest});
}

// Forwards y is h and x is b; of the adjoint y is db and x is dh, and the carry is c.
//   [state]   h_t = a_t h_{t-1} + b_t
//   [dstate]  g_t = dh_t + c_{t+1}, c_t = conj(a_t) g_t
template <bool kAdjoint, class Number>
inline Number advance(Number a, Number x, Number& carry) {
  if constexpr (kAdjoint) {
    const Number g = x + carry;
    carry = product(conj(a), g);
    return g;
  } else {
    return carry = madd(a, carry, x);
  }
}

// Of a tile in the backward: the previous token's h, where da goes.
template <class TA, class TX>
struct Gradient {
  Rows<const TX> h;
  Rows<TA> da;
  bool log_space;
};

template <class F, bool kAdjoint, class TA, class TX>
inline void scan_tile(const Extent& extent, Rows<const TA> a, Rows<const TX> x, Rows<TX> y, typename F::A* carry) {
  for_each_unit<F>(extent, [&](int64_t u, auto size) {
    typename F::Number state = F::get(carry + u * F::kUnit);
    for (int64_t t = 0; t < extent.tokens; ++t) {
      const auto a_t = F::load(a.at(t, u), size), x_t = F::load(x.at(t, u), size);
      F::store(y.at(t, u), advance<kAdjoint>(a_t, x_t, state), size);
    }
    F::put(carry + u * F::kUnit, state);
  });
}

// The adjoint, with [da] da_t = conj(h_{t-1}) g_t, times conj(a_t) where that is exp.
template <class F, class TA, class TX>
inline void differentiate_tile(const Extent& extent, Rows<const TA> a, Rows<const TX> x, Rows<TX> y,
                               typename F::A* carry, const Gradient<TA, TX>& gradient) {
  const auto [h, da, log_space] = gradient;
  for_each_unit<F>(extent, [&](int64_t u, auto size) {
    typename F::Number state = F::get(carry + u * F::kUnit);
    for (int64_t t = 0; t < extent.tokens; ++t) {
      const auto a_t = F::load(a.at(t, u), size), x_t = F::load(x.at(t, u), size);
      const auto g = advance<true>(a_t, x_t, state);
      auto d = product(conj(F::load(h.at(t, u), size)), g);
      if (log_space) d = zero_where_zero(a_t, product(conj(a_t), d));
      F::store(y.at(t, u), g, size);
      F::store(da.at(t, u), d, size);
    }
    F::put(carry + u * F::kUnit, state);
  });
}

// The affine map of the tokens before a tile becomes that of its tokens too.
template <class F, bool kAdjoint, class TX>
inline void compose_tile(const Extent& extent, Rows<const typename F::A> a, Rows<const TX> x, typename F::A* map_a,
                         typename F::A* map_b) {
  for_each_unit<F>(extent, [&](int64_t u, auto size) {
    typename F::Number factor = F::get(map_a + u * F::kUnit), state = F::get(map_b + u * F::kUnit);
    for (int64_t t = 0; t < extent.tokens; ++t) {
      const auto a_t = F::load(a.at(t, u), size);
      factor = product(kAdjoint ? conj(a_t) : a_t, factor);
      advance<kAdjoint>(a_t, F::load(x.at(t, u), size), state);
    }
    F::put(map_a + u * F::kUnit, factor);
    F::put(map_b + u * F::kUnit, state);
  });
}

// [decay] a_t as numbers of accumulators, from memory of any type.
template <class F, class T>
inline void load_decays(const Extent& extent, Rows<const T> from, bool log_space, Rows<typename F::A> to) {
  for (int64_t t = 0; t < extent.tokens; ++t) {
    const auto store = [&](int64_t u, typename F::Number a) { F::store(to.at(t, u), log_space ? exp(a) : a); };
    if (from.unit == 0)
      store(0, F::broadcast(from.at(t, 0)));
    else
      for_each_unit<F>(extent, [&](int64_t u, auto size) { store(u, F::load(from.at(t, u), size)); });
  }
}

template <class F, class T, class To>
inline void convert_rows(const Extent& extent, Rows<const T> from, Rows<To> to) {
  for (int64_t t = 0; t < extent.tokens; ++t)
    for_each_unit<F>(extent, [&](int64_t u, auto size) { F::store(to.at(t, u), F::load(from.at(t, u), size), size); });
}

template <class F, class T>
inline void clear_rows(const Extent& extent, Rows<T> to) {
  for (int64_t t = 0; t < extent.tokens; ++t)
    for_each_unit<F>(extent, [&](int64_t u, auto size) { F::store(to.at(t, u), typename F::Number{}, size); });
}

}  // namespace
}  // namespace seqkern::linear_scan

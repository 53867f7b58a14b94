// One new token per batch row against states that are updated in place. Internal to cpu.cpp.
//
// R is read once, as it lies: an element of its product is a sum over the lanes of a row. The rows of a strip of units
// serve all batch rows while they are in the caches.
#pragma once
#include "common/parallel.h"
#include "common/rows.h"
#include "common/slstm_state.h"
#include "common/state_row.h"
#include "rnn/cpu_call.h"

namespace seqkern::rnn {
namespace {

// Of `count` rows of `size` elements, at most as many as there are lanes, the products with each of kCount vectors x,
// x_row apart. Those with one vector lie to_row from those with the next.
template <int kCount, class X, class A>
[[gnu::noinline]] inline void multiply_lanes(const X* rows, int64_t count, int64_t size, const A* x, int64_t x_row,
                                             A* to, int64_t to_row) {
  using V = Vec<A>;
  constexpr int kRows = kLanes<A> < 8 / kCount ? kLanes<A> : kCount == 1 ? 8 : 4;  // enough sums to hide latency
  V sums[kCount][kLanes<A>] = {};
  for (int64_t i = 0; i < count; i += kRows) {
    const X* row[kRows];
    for (int r = 0; r < kRows; ++r) row[r] = rows + at_most(i + r, count - 1) * size;
    V sum[kCount][kRows] = {};
    for_each_vector<A>(size, [&]<bool kWhole>(int64_t q, int lanes) {
      V of_row[kRows];
      for (int r = 0; r < kRows; ++r) of_row[r] = load_lanes<A, kWhole>(row[r] + q, lanes);
      for (int j = 0; j < kCount; ++j) {
        const V x_j = load_lanes<A, kWhole>(x + j * x_row + q, lanes);
        for (int r = 0; r < kRows; ++r) sum[j][r] = madd(of_row[r], x_j, sum[j][r]);
      }
    });
    for (int j = 0; j < kCount; ++j)
      for (int r = 0; r < kRows; ++r) sums[j][i + r] = sum[j][r];
  }
  for (int j = 0; j < kCount; ++j) store<A>(to + j * to_row, sums_of_lanes<A>(sums[j]));
}

// C is a cell of vectors, X the element type of x, which weights are read as.
template <class C, class X>
struct Step {
  using A = Accumulator<X>;
  using V = Vec<A>;
  using Rows = StepParams::Rows;
  static constexpr int kG = C::kGates, kC = C::kCarried, kStates = kC == 2 ? 4 : kC + 1;
  using Carried = V[kC > 0 ? kC : 1];
  static constexpr int64_t kStrip = 2 * kLanes<A>;            // units, or outputs, that are worked on together
  static constexpr int kBatch = kLanes<float> == 16 ? 4 : 2;  // batch rows whose sums stay in registers

  const StepParams& p;
  const bool projects = p.proj || p.outputs != p.units;
  const int64_t unit_row = round_up(p.units, kStrip), output_row = round_up(p.outputs, kStrip);  // of m and before

  void run() const {
    const int64_t batch_heads = p.batch * p.heads;
    Scratch scratch((batch_heads * (unit_row + output_row) + kStrip) * static_cast<int64_t>(sizeof(A)));
    A* const before = scratch.take<A>(batch_heads * output_row);          // (B, H, output_row): h_{t-1}
    A* const m = scratch.take<A>(projects ? batch_heads * unit_row : 0);  // (B, H, unit_row)
    parallel_for(0, batch_heads, kGrain / at_least(1, p.outputs) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) load_h(i / p.heads, i % p.heads, before + i * output_row);
    });
    for_all_strips(p.units, kG * p.outputs, [&](int64_t head, int64_t first) { advance(head, first, before, m); });
    if (!projects) return;
    for_all_strips(p.outputs, p.units, [&](int64_t head, int64_t first) { project(head, first, before, m); });
  }

  // Calls body(head, first) for the strips of `size` units of all heads, whose every unit takes `work` products.
  template <class Body>
  void for_all_strips(int64_t size, int64_t work, const Body& body) const {
    const int64_t strips = ceil_div(size, kStrip), of_strip = at_least(1, p.batch * kStrip * work);
    parallel_for(0, p.heads * strips, kGrain / of_strip + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i / strips, i % strips * kStrip);
    });
  }

  void load_h(int64_t b, int64_t head, A* to) const {
    const int64_t row = state_row(p, b);
    clear(to, output_row);
    if (row >= 0) load_part(p.state[0], row, head, 0, p.outputs, to);
  }

  // Units of a strip: (kStrip,) each.
  struct Strip {
    A x[kG][kStrip] = {}, bias[kG][kStrip] = {}, state[kStates][kStrip] = {};
  };

  // Units [first, first + kStrip) of a head.
  void advance(int64_t head, int64_t first, const A* before, A* m) const {
    const int64_t count = at_most(kStrip, p.units - first);
    Strip s;
    if (p.bias)
      for (int g = 0; g < kG; ++g) load_array(p.bias, (head * kG + g) * p.units + first, count, s.bias[g]);
    A u[kBatch][kG][kStrip];
    for_each_batch<kBatch>(0, [&]<int kCount>(int64_t b) {
      for (int g = 0; g < kG; ++g)
        multiply_rows<kCount>(p.R, (head * kG + g) * p.units + first, count, p.outputs,
                              of_row(before, output_row, b, head), p.heads * output_row, u[0][g], kG * kStrip);
      for (int i = 0; i < kCount; ++i)
        advance_row(b + i, head, first, count, u[i], of_row(before, output_row, b + i, head),
                    of_row(m, unit_row, b + i, head), s);
    });
  }

  void advance_row(int64_t b, int64_t head, int64_t first, int64_t count, const A (&u)[kG][kStrip], const A* before,
                   A* m, Strip& s) const {
    const int64_t row = state_row(p, b);
    if (row < 0) {
      if (!projects) finish(b, head, first, count, row, before, s.state[0]);
      return;
    }
    for (int g = 0; g < kG; ++g) load_strided(p.x, b * p.x.b + head * p.x.h + g * p.x.g + first, 1, count, s.x[g]);
    for (int i = 1; i < kStates; ++i) load_part(p.state[i], row, head, first, count, s.state[i]);
    for (int64_t j = 0; j < count; j += kLanes<A>) {
      V x[kG], u_j[kG];
      Carried c;
      for (int g = 0; g < kG; ++g)
        x[g] = load<A>(s.x[g] + j), u_j[g] = load<A>(u[g] + j) + load<A>(s.bias[g] + j);  // [recur]
      take_state(s, j, c);
      store<A>(s.state[0] + j, C::step(x, u_j, C::kReadsH ? load<A>(before + first + j) : V{}, c));  // [cell]
      put_state(c, j, s);
    }
    for (int i = 1; i < kStates; ++i) store_part(s.state[i], p.state[i], row, head, first, count);
    if (projects)
      copy(s.state[0], kStrip, m + first);
    else
      finish(b, head, first, count, row, before, s.state[0]);
  }

  // [proj]: outputs [first, first + kStrip) of a head.
  void project(int64_t head, int64_t first, const A* before, const A* m) const {
    const int64_t count = at_most(kStrip, p.outputs - first);
    A h[kBatch][kStrip];
    for_each_batch<kBatch>(0, [&]<int kCount>(int64_t b) {
      multiply_rows<kCount>(p.proj, head * p.outputs + first, count, p.units, of_row(m, unit_row, b, head),
                            p.heads * unit_row, h[0], kStrip);
      for (int i = 0; i < kCount; ++i)
        finish(b + i, head, first, count, state_row(p, b + i), of_row(before, output_row, b + i, head), h[i]);
    });
  }

  // [zoneout]; h goes to where it belongs.
  void finish(int64_t b, int64_t head, int64_t first, int64_t count, int64_t row, const A* before, A* h) const {
    if (row < 0) {
      clear(h, kStrip);
      return store_part(h, p.h, b, head, first, count);
    }
    if (p.zoneout > 0)
      for (int64_t j = 0; j < kStrip; j += kLanes<A>) {
        const V h_j = load<A>(h + j);
        store<A>(h + j, madd(splat(static_cast<A>(p.zoneout)), load<A>(before + first + j) - h_j, h_j));
      }
    store_part(h, p.state[0], row, head, first, count);
    store_part(h, p.h, b, head, first, count);
  }

  // ---- products

  // Calls body<count>(b) for batch rows, kCount and then fewer at a time.
  template <int kCount, class Body>
  void for_each_batch(int64_t b, const Body& body) const {
    for (; b + kCount <= p.batch; b += kCount) body.template operator()<kCount>(b);
    if constexpr (kCount > 1) for_each_batch<kCount / 2>(b, body);
  }

  // Of a matrix with rows of `size` elements, the rows [first, first + count), times each of kCount vectors x, x_row
  // apart. Products with one vector lie to_row from those with the next.
  template <int kCount>
  void multiply_rows(const Array& matrix, int64_t first, int64_t count, int64_t size, const A* x, int64_t x_row, A* to,
                     int64_t to_row) const {
    const bool as_it_is = matrix.dtype == p.x.dtype;
    Scratch scratch(as_it_is ? 0 : count * size * static_cast<int64_t>(sizeof(X)));
    const X* rows = static_cast<const X*>(matrix.data) + first * size;
    if (!as_it_is) {
      X* const converted = scratch.take<X>(count * size);
      load_array(matrix, first * size, count * size, converted);
      rows = converted;
    }
    for (int64_t i = 0; i < count; i += kLanes<A>)
      multiply_lanes<kCount>(rows + i * size, at_most(kLanes<A>, count - i), size, x, x_row, to + i, to_row);
  }

  // ---- states

  static void take_state(const Strip& s, int64_t j, Carried& c) {
    if constexpr (kC == 2)
      SlstmState<A>::carry(load<A>(s.state[1] + j), load<A>(s.state[2] + j), load<A>(s.state[3] + j), c[0], c[1]);
    else
      for (int i = 0; i < kC; ++i) c[i] = load<A>(s.state[1 + i] + j);
  }
  static void put_state(const Carried& c, int64_t j, Strip& s) {
    V shown[kStates] = {};
    if constexpr (kC == 2)
      SlstmState<A>::show(c[0], c[1], shown[1], shown[2], shown[3]);
    else
      for (int i = 0; i < kC; ++i) shown[1 + i] = c[i];
    for (int i = 1; i < kStates; ++i) store<A>(s.state[i] + j, shown[i]);
  }

  static void load_part(const Rows& from, int64_t row, int64_t head, int64_t first, int64_t count, A* to) {
    load_strided(from, row * from.b + head * from.h + first * from.p, from.p, count, to);
  }
  static void store_part(const A* from, const Rows& to, int64_t row, int64_t head, int64_t first, int64_t count) {
    store_strided(from, to, row * to.b + head * to.h + first * to.p, to.p, count);
  }
  // Of (B, H, size).
  template <class T>
  T* of_row(T* x, int64_t size, int64_t b, int64_t head) const {
    return x + (b * p.heads + head) * size;
  }

  static constexpr int64_t kGrain = 1 << 16;  // products worth another thread
};

inline void step_tokens(const StepParams& p) {
  visit_dtype(p.x.dtype,
              [&]<class X>() { visit_cell<Vec<Accumulator<X>>>(p.cell, [&]<class C>() { Step<C, X>{p}.run(); }); });
}

}  // namespace
}  // namespace seqkern::rnn

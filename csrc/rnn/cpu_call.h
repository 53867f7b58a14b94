// What the CPU kernels share: who takes which rows and units through time, weights packed for products, and how numbers
// come from memory and go back. Internal to cpu.cpp.
//
// The units of a head are cut into strips. A strip is one product, of the operands of all rows by a panel of weights
// that lie one after another, and then its cells, row by row. In scratch memory rows are padded to whole strips.
#pragma once
#include "common/gemm.h"
#include "common/number.h"
#include "common/parallel.h"
#include "common/random.h"
#include "common/rows.h"
#include "common/team.h"
#include "rnn/cells.h"
#include "rnn/cpu_plan.h"

namespace seqkern::rnn {
namespace {

// body.template operator()<C>() with a cell of numbers V.
template <class V, class Body>
inline void visit_cell(Cell cell, const Body& body) {
  switch (cell) {
    case Cell::kLstm:
      return body.template operator()<Lstm<V>>();
    case Cell::kGru:
      return body.template operator()<Gru<V>>();
    case Cell::kSlstm:
      return body.template operator()<Slstm<V>>();
    case Cell::kElmanTanh:
      return body.template operator()<ElmanTanh<V>>();
    case Cell::kElmanRelu:
      return body.template operator()<ElmanRelu<V>>();
  }
}
// body.template operator()<C, X, T>() with the cell of a call, of vectors, the element type of its data, and that of
// operands of products.
template <class Body>
inline void visit_call(const Inputs& in, const Body& body) {
  visit_dtype(in.x.dtype, [&]<class X>() {
    visit_operands<X>([&]<class T>() {
      visit_cell<Vec<SumOf<T>>>(in.cell, [&]<class C>() { body.template operator()<C, X, T>(); });
    });
  });
}

// ---- rows

// Runs that go through time side by side, the longest first: those that have a token t come before those that have not.
struct Tile {
  const Run* const* runs;
  int64_t stride, count;

  const Run& run(int64_t row) const { return *runs[row * stride]; }
  int64_t length(int64_t row) const { return run(row).end - run(row).begin; }
  int64_t longest() const { return count > 0 ? length(0) : 0; }
  // How many have a token t, given how many have a neighbour of it.
  int64_t active(int64_t t, int64_t rows) const {
    while (rows > 0 && length(rows - 1) <= t) --rows;
    while (rows < count && length(rows) > t) ++rows;
    return rows;
  }
};

inline int longest_first(const void* left, const void* right) {
  const Run* const a = *static_cast<const Run* const*>(left);
  const Run* const b = *static_cast<const Run* const*>(right);
  const int64_t a_length = a->end - a->begin, b_length = b->end - b->begin;
  return a_length != b_length ? (a_length > b_length ? -1 : 1) : a < b ? -1 : a > b;
}

// A tile's way through time, as one member of a team sees it, with the heads from `head` on.
struct Walk {
  Tile tile;
  int64_t head;
  Member member;
};

// ---- weights

// Right operands (k, n) of one size, one after another.
template <class T>
struct Panels {
  T* data;
  int64_t k, n;

  static constexpr int64_t room(int64_t k, int64_t n, int64_t count) { return right_room<T>(k, n) * count; }
  T* at(int64_t i) const { return data + i * right_room<T>(k, n); }
  Right<T> operator[](int64_t i) const { return {at(i), right_room<T>(1, n)}; }
};

// c (m, n) = a b, or += a b. Where there are more rows than are multiplied at once, b is taken in pieces that stay in
// the first-level cache until the last row; an element is the same sum.
template <class T>
inline void multiply_panel(Left<T> a, Right<T> b, SumOf<T>* c, int64_t c_row, int64_t m, int64_t n, int64_t k,
                           bool accumulate = false) {
  if constexpr (!kSame<T, BFloat16>) {
    constexpr int64_t kPieceBytes = 1 << 15;
    const int64_t piece = kPieceBytes / (n * static_cast<int64_t>(sizeof(T)));
    if (m > kBlockRows && k > piece) {
      for (int64_t from = 0; from < k; from += piece)
        multiply<T>({a.data + from, a.row, 1}, {b.data + from * b.row, b.row}, c, c_row, m, n, at_most(piece, k - from),
                    accumulate || from > 0);
      return;
    }
  }
  multiply<T>(a, b, c, c_row, m, n, k, accumulate);
}

// ---- vectors of which the last of a row may have fewer lanes

template <class A, bool kWhole, class E>
[[gnu::always_inline]] inline Vec<A> load_lanes(const E* p, int lanes) {
  if constexpr (kWhole) return load<A>(p);
  return load<A>(p, lanes);
}
template <class A, bool kWhole, class E>
[[gnu::always_inline]] inline void store_lanes(E* p, Vec<A> v, int lanes) {
  if constexpr (kWhole) return store<A>(p, v);
  store<A>(p, v, lanes);
}

// Calls body.template operator()<kWhole>(i, lanes) for vectors from i on that cover [0, size).
template <class A, class Body>
[[gnu::always_inline]] inline void for_each_vector(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<A> <= size; i += kLanes<A>) body.template operator()<true>(i, kLanes<A>);
  if (i < size) body.template operator()<false>(i, static_cast<int>(size - i));
}

// ---- a call

template <class C_, class X_, class T_>
struct Call {
  using C = C_;        // cell
  using X = X_;        // elements of x and of all that has its dtype
  using T = T_;        // operands of products
  using A = SumOf<T>;  // sums and states
  using V = Vec<A>;
  static constexpr int kG = C::kGates, kC = C::kCarried;
  using Carried = V[kC > 0 ? kC : 1];
  static constexpr int64_t kWide = 4 * kLanes<A>;                // what rows in scratch memory are padded to
  static constexpr int64_t kLine = 64;                           // bytes
  static constexpr int64_t kStrip = kG > 1 ? kLanes<A> : kWide;  // units of a strip

  const Inputs& in;
  const int64_t P = in.units, Q = in.outputs;
  const CpuPlan plan = cpu_plan(in, sizeof(T), num_threads());
  const int64_t heads = plan.team > 1 ? in.heads : 1;                          // whose arrays lie together
  const int64_t rows = padded<T>(plan.rows);                                   // of arrays
  const int64_t P_row = row_of(P), Q_row = row_of(Q);                          // from row to row of arrays
  const int64_t P_room = heads * rows * P_row, Q_room = heads * rows * Q_row;  // of arrays
  const int64_t strips = ceil_div(P, kStrip);
  const int64_t output_strip = in.projects() ? kWide : kStrip, output_strips = ceil_div(Q, output_strip);

  // Whole strips, and a line more: rows that are a power of two apart would share few lines of the first-level cache.
  static constexpr int64_t row_of(int64_t size) { return round_up(size, kWide) + kLine / int64_t{sizeof(T)}; }

  explicit Call(const Inputs& inputs) : in(inputs), by_length_(in.num_runs * static_cast<int64_t>(sizeof(Run*))) {
    runs_ = by_length_.take<const Run*>(in.num_runs);
    for (int64_t r = 0; r < in.num_runs; ++r) runs_[r] = in.runs + r;
    qsort(runs_, static_cast<size_t>(in.num_runs), sizeof *runs_, longest_first);
  }

  // Anything from the take() of InScratch, which counts in accumulators.
  template <class Any, class Take>
  static Any* take_any(const Take& take, int64_t count) {
    return reinterpret_cast<Any*>(take(ceil_div(count * static_cast<int64_t>(sizeof(Any)), sizeof(A))));
  }
  template <class Take>
  static T* take_operands(const Take& take, int64_t count) {
    return take_any<T>(take, count);
  }

  // ---- who does what

  int64_t num_tiles() const { return ceil_div(in.num_runs, plan.rows * plan.at_once) * plan.at_once; }
  Tile tile(int64_t i) const {
    const int64_t dealt = plan.rows * plan.at_once, begin = i / plan.at_once * dealt;
    const int64_t first = begin + i % plan.at_once, end = at_most(in.num_runs, begin + dealt);
    return {runs_ + first, plan.at_once, at_least(0, ceil_div(end - first, plan.at_once))};
  }

  // Calls body(walk, arrays) for every tile and head, or all heads at once. Arrays: for `heads` heads and `rows` rows,
  // allocate(self, take) as for InScratch, and clear(self).
  template <class Arrays, class Self, class Body>
  void for_each_walk(const Self& self, const Body& body) const {
    const auto walk = [&](int64_t begin, int64_t end, int64_t of_tile, const Member& member, const Arrays& arrays) {
      const Multiplier<T> multiplier;
      const FlushSubnormals flush;  // which states and gradients that fade become, and stay for long
      for (int64_t i = begin; i < end; ++i) body(Walk{tile(i / of_tile), i % of_tile, member}, arrays);
    };
    if (plan.team > 1) {
      InScratch<A, Arrays> arrays(self);
      arrays.clear(self);
      in_team(plan.team, [&](const Member& member) { walk(0, num_tiles(), 1, member, arrays); });
    } else {
      const int64_t tasks = num_tiles() * in.heads;
      const int64_t work = at_least(1, in.sequences.batch * in.sequences.length * in.heads * kG * P * Q);
      parallel_for(0, tasks, ceil_div(tasks * kWorkOfThread, work), [&](int64_t begin, int64_t end) {
        InScratch<A, Arrays> arrays(self);
        arrays.clear(self);
        walk(begin, end, in.heads, Member{}, arrays);
      });
    }
  }

  // Calls body(head, strip) for a member's share of `strips` of all heads of a walk; `head` counts from the walk's.
  template <class Body>
  void for_each_strip(const Walk& w, int64_t strips, const Body& body) const {
    for_each_strip(w, strips, 0, body);
  }
  // At odd t from the last to the first: of weights that are larger than a cache those used last are still there.
  template <class Body>
  void for_each_strip(const Walk& w, int64_t strips, int64_t t, const Body& body) const {
    const int64_t all = heads * strips, size = w.member.size;
    const int64_t begin = all * w.member.index / size, end = all * (w.member.index + 1) / size;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t i = t % 2 == 0 ? n : begin + end - 1 - n;
      body(i / strips, i % strips);
    }
  }

  // ---- where a token lies

  int64_t token(const Run& run, int64_t t) const { return in.sequences.reverse ? run.end - 1 - t : run.begin + t; }
  // Of a tensor of gates, tokens or carried numbers: those of a head at t, from an element on.
  template <class E, class Data>
  E* at(const Data& x, const Run& run, int64_t t, int64_t head, int64_t element) const {
    return static_cast<E*>(x.data) + run.b * x.b + token(run, t) * x.l + head * x.h + element;
  }

  // ---- weights

  // Panels of `count` of each head; fill(head, i, rows) writes panel i transposed, as (n, k) elements of x's type.
  template <class Fill>
  void pack_rows(const Panels<T>& panels, int64_t count, const Fill& fill) const {
    const int64_t k = panels.k, n = panels.n;
    parallel_for(0, in.heads * count, ceil_div(kWorkOfThread, at_least(1, k * n)), [&](int64_t begin, int64_t end) {
      Scratch scratch(n * k * static_cast<int64_t>(sizeof(X)));
      X* const rows = scratch.take<X>(n * k);
      for (int64_t i = begin; i < end; ++i) {
        fill(i / count, i % count, rows);
        pack_right<T>(rows, 1, k, k, n, panels.at(i));
      }
    });
  }
  // `count` rows of weights of `size` elements from `row` on, and rows of zeros up to `room`.
  static void load_weights(const Array& weights, int64_t row, int64_t count, int64_t room, int64_t size, X* to) {
    load_array(weights, row * size, count * size, to);
    __builtin_memset(to + count * size, 0, static_cast<size_t>((room - count) * size) * sizeof(X));
  }
  // [recur] (Q, G kStrip) of a strip of units.
  Panels<T> recurrent_panels(T* room) const { return {room, Q, kG * kStrip}; }
  void pack_recurrent(const Panels<T>& panels) const {
    pack_rows(panels, strips, [&](int64_t head, int64_t strip, X* to) {
      const int64_t first = strip * kStrip, count = at_most(kStrip, P - first);
      for (int g = 0; g < kG; ++g)
        load_weights(in.R, (head * kG + g) * P + first, count, kStrip, Q, to + g * kStrip * Q);
    });
  }
  // [proj] (P, kWide) of a strip of outputs.
  Panels<T> projecting_panels(T* room) const { return {room, P, kWide}; }
  void pack_projecting(const Panels<T>& panels) const {
    pack_rows(panels, output_strips, [&](int64_t head, int64_t strip, X* to) {
      const int64_t first = strip * kWide;
      load_weights(in.proj, head * Q + first, at_most(kWide, Q - first), kWide, P, to);
    });
  }

  // Of every head, in strips: (strips, G, kStrip), zeros without bias.
  int64_t bias_room() const { return in.heads * strips * kG * kStrip; }
  void load_bias(A* to) const {
    clear(to, bias_room());
    if (!in.bias) return;
    for (int64_t i = 0; i < in.heads * strips; ++i) {
      const int64_t head = i / strips, first = i % strips * kStrip;
      for (int g = 0; g < kG; ++g, to += kStrip)
        load_array(in.bias, (head * kG + g) * P + first, at_most(kStrip, P - first), to);
    }
  }

  // ---- states: `count` numbers of a head from `first` on, of row `row` of (rows, H, size)

  void load_state(const Array& states, int64_t row, int64_t head, int64_t size, int64_t first, int64_t count,
                  A* to) const {
    load_array(states, (row * in.heads + head) * size + first, count, to);
  }
  void store_state(const A* from, const Array& states, int64_t row, int64_t head, int64_t size, int64_t first,
                   int64_t count) const {
    store_array(from, count, states, (row * in.heads + head) * size + first);
  }
  // c before a run, of units [first, first + count): part i goes to c + i * part, whole vectors.
  void load_carried(const Run& run, int64_t head, int64_t first, int64_t count, A* c, int64_t part) const {
    if constexpr (kC > 0) {
      Carried empty;
      C::empty(empty);
      for (int i = 0; i < kC; ++i) {
        for (int64_t p = 0; p < count; p += kLanes<A>) store<A>(c + i * part + p, empty[i]);
        if (in.initial_c && run.initial >= 0)
          load_state(in.initial_c, i * in.sequences.count + run.initial, head, P, first, count, c + i * part);
      }
    }
  }
  // h before a run, of outputs [first, first + count), whole vectors.
  void load_hidden(const Run& run, int64_t head, int64_t first, int64_t count, A* h) const {
    clear(h, count);
    if (in.initial_h && run.initial >= 0) load_state(in.initial_h, run.initial, head, Q, first, count, h);
  }

  // ---- random numbers

  // 1 in the lanes of those elements of (H, Q), from `element` on, to which it happens; else 0.
  [[gnu::noinline]] V happenings(RandomKind kind, int64_t first, int64_t element, double probability) const {
    V flags{};
    Random4 random{};
    for (int i = 0; i < kLanes<A>; ++i) {
      const int64_t e = element + i;
      if (i == 0 || e % 4 == 0)
        random =
            philox(static_cast<uint64_t>(*in.seed), static_cast<uint64_t>(first), static_cast<uint32_t>(e / 4), kind);
      flags[i] = happens(random.word[e % 4], static_cast<float>(probability));
    }
    return flags;
  }
  // [zoneout] in training: of the outputs that keep their old value at token t.
  V kept(const Run& run, int64_t t, int64_t head, int64_t output) const {
    return happenings(kZoneoutWords, run.b * in.sequences.length + token(run, t), head * Q + output, in.zoneout);
  }
  // [dropout]: what the product reads of outputs [first, first + count), whole vectors, is multiplied with.
  void load_factors(const Run& run, int64_t head, int64_t first, int64_t count, A* factors) const {
    for (int64_t q = 0; q < count; q += kLanes<A>) {
      const V dropped = happenings(kDropoutWords, run.sequence, head * Q + first + q, in.recurrent_dropout);
      store<A>(factors + q, select(dropped != 0, V{}, splat(static_cast<A>(1 / (1 - in.recurrent_dropout)))));
    }
  }

 private:
  Scratch by_length_;
  const Run** runs_;
};

}  // namespace
}  // namespace seqkern::rnn

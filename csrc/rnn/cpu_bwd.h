// The backward pass, last token first. Internal to cpu.cpp.
//
// A token is, for every strip of outputs, the gradient of h; with proj the product of that by proj; for every strip of
// units [adjoint]; and for every strip of outputs the product [return]. The members of a team own the same strips at
// every token, and meet before each product.
#pragma once
#include "rnn/cpu_call.h"

namespace seqkern::rnn {
namespace {

template <class C, class X, class T>
struct Backward : Call<C, X, T> {
  using Base = Call<C, X, T>;
  using Base::in, Base::P, Base::Q, Base::P_row, Base::Q_row, Base::P_room, Base::Q_room, Base::heads, Base::rows;
  using Base::kG, Base::kC, Base::kWide;
  using typename Base::A, typename Base::V, typename Base::Carried;

  const BwdParams& p;
  const int64_t unit_strips = ceil_div(P, kWide), output_strips = ceil_div(Q, kWide);
  const int64_t gates_row = Base::row_of(kG * P);
  const bool direct = C::kReadsH || in.zones();  // whether h_t reads h_{t-1} beside the product

  explicit Backward(const BwdParams& params) : Base(params), p(params) {}

  // Of every head: R by strips of outputs (G P, kWide), proj by strips of units (Q, kWide).
  struct Weights {
    Panels<T> returning, projecting;

    template <class Take>
    void allocate(const Backward& call, const Take& take) {
      const auto panels = [&](int64_t k, int64_t strips) {
        const int64_t room = Panels<T>::room(k, kWide, call.in.heads * strips);
        return Panels<T>{Base::take_operands(take, room), k, kWide};
      };
      returning = panels(kG * call.P, call.output_strips);
      if (call.in.projects()) projecting = panels(call.Q, call.unit_strips);
    }
  };

  struct Arrays {
    A* dh;         // (heads, rows, Q): what comes back to h_t
    A* dc;         // (C, heads, rows, P): of c_t
    A* first_c;    // (C, heads, rows, P): before the first token
    X* first_h;    // (heads, rows, Q)
    A* factors;    // (heads, rows, Q): of [dropout]
    T* du[2];      // (heads, rows, G P): of even t, and of odd t
    T* projected;  // (heads, rows, Q): the gradient of proj m
    A* sums;       // (members, rows, kWide): products of a strip

    template <class Take>
    void allocate(const Backward& call, const Take& take) {
      dh = take(call.Q_room), dc = take(kC * call.P_room), first_c = take(kC * call.P_room);
      first_h = reinterpret_cast<X*>(take(call.Q_room));
      if (call.in.drops()) factors = take(call.Q_room);
      for (T*& of : du) of = Base::take_operands(take, call.gates_room());
      if (call.in.projects()) projected = Base::take_operands(take, call.Q_room);
      sums = take(call.plan.team * call.rows * kWide);
    }
    void clear(const Backward& call) {  // paddings that products read
      for (T* of : du) __builtin_memset(of, 0, static_cast<size_t>(call.gates_room()) * sizeof(T));
      if (call.in.projects()) __builtin_memset(projected, 0, static_cast<size_t>(call.Q_room) * sizeof(T));
    }
  };
  int64_t gates_room() const { return heads * rows * gates_row; }

  void run() const {
    const InScratch<A, Weights> weights(*this);
    pack_columns(weights.returning, in.R, Q, output_strips);
    if (in.projects()) pack_columns(weights.projecting, in.proj, P, unit_strips);
    this->template for_each_walk<Arrays>(*this, [&](const Walk& w, const Arrays& a) { walk(w, weights, a); });
  }

  // A strip of a head at t: units or outputs from `first` on, of so many rows.
  struct Strip {
    const Walk& w;
    int64_t head, first, count, t, rows;
    A* sums;  // (rows, kWide)

    int64_t head_of_call() const { return w.head + head; }
    const Run& run(int64_t row) const { return w.tile.run(row); }
  };

  void walk(const Walk& w, const Weights& weights, const Arrays& a) const {
    load_first(w, a);
    w.member.wait();
    int64_t active = 0;
    for (int64_t t = w.tile.longest() - 1; t >= 0; --t) {
      const int64_t before = active;
      active = w.tile.active(t, active);
      load_final(w, before, active, a);
      const auto for_all = [&](int64_t strips, int64_t size, const auto& body) {
        this->for_each_strip(w, strips, t, [&](int64_t head, int64_t strip) {
          const int64_t first = strip * kWide;
          body(Strip{w, head, first, at_most(kWide, size - first), t, active, a.sums + w.member.index * rows * kWide});
        });
      };
      if (in.projects()) {
        for_all(output_strips, Q, [&](const Strip& s) { differentiate_outputs(s, a); });
        w.member.wait();
      }
      for_all(unit_strips, P, [&](const Strip& s) { differentiate_units(s, weights, a); });
      w.member.wait();
      for_all(output_strips, Q, [&](const Strip& s) { pass_back(s, weights, a); });
    }
    load_final(w, active, w.tile.count, a);  // of runs without tokens
    store_initial(w, a);
  }

  // Where the numbers of a row lie from a strip's first output on.
  struct OutputRow {
    const X *dh, *h;  // h of the token before
    X *operand, *total;
    A* carried;  // dh
    const A* factors;
    int64_t output;

    OutputRow(const Backward& call, const Strip& s, int64_t row, const Arrays& a) : output(s.first) {
      const int64_t place = (s.head * call.rows + row) * call.Q_row + s.first, head = s.head_of_call();
      const auto of = [&](const TokenData& y, int64_t t) {
        return call.template at<X>(y, s.run(row), t, head, s.first);
      };
      dh = of(call.p.dh, s.t), h = s.t > 0 ? of(call.p.h, s.t - 1) : a.first_h + place;
      operand = call.p.operand ? of(call.p.operand, s.t) : nullptr;
      total = call.p.dh_total ? of(call.p.dh_total, s.t) : nullptr;
      carried = a.dh + place, factors = call.in.drops() ? a.factors + place : nullptr;
    }
  };

  // The gradient of a vector of h_t, of which [zoneout] gives `to_old` to h_{t-1} and the result to its new value.
  // Leaves what R was multiplied with [dropout].
  template <bool kWhole>
  [[gnu::always_inline]] V differentiate_output(const Strip& s, int64_t row, const OutputRow& of, int64_t i, int lanes,
                                                V& to_old) const {
    const V dh = load<A>(of.carried + i) + load_lanes<A, kWhole>(of.dh + i, lanes);
    fetch_ahead(of.dh + i, p.dh.l);
    if (of.operand) {
      V h = load_lanes<A, kWhole>(of.h + i, lanes);
      if (of.factors) h *= load<A>(of.factors + i);
      store_lanes<A, kWhole>(of.operand + i, h, lanes);
    }
    to_old = V{};
    if (!in.zones()) return dh;
    if (in.training) {
      const auto kept = this->kept(s.run(row), s.t, s.head_of_call(), of.output + i) != 0;
      to_old = select(kept, dh, V{});
      return select(kept, V{}, dh);
    }
    to_old = static_cast<A>(in.zoneout) * dh;
    return static_cast<A>(1 - in.zoneout) * dh;
  }

  // With proj, whose gradient these are.
  void differentiate_outputs(const Strip& s, const Arrays& a) const {
    for (int64_t row = 0; row < s.rows; ++row) {
      const OutputRow of(*this, s, row, a);
      T* const projected = a.projected + (s.head * rows + row) * Q_row + s.first;
      for_each_vector<A>(s.count, [&]<bool kWhole>(int64_t i, int lanes) {
        V to_old;
        const V dh = differentiate_output<kWhole>(s, row, of, i, lanes, to_old);
        store<A>(of.carried + i, to_old);
        store_lanes<A, kWhole>(projected + i, dh, lanes);
        if (of.total) store_lanes<A, kWhole>(of.total + i, dh, lanes);
      });
    }
  }

  // [adjoint]
  void differentiate_units(const Strip& s, const Weights& weights, const Arrays& a) const {
    const int64_t head = s.head_of_call();
    if (in.projects())
      multiply_panel<T>({a.projected + s.head * rows * Q_row, Q_row, 1},
                        panel(weights.projecting, head * unit_strips + s.first / kWide, s.count), s.sums, kWide, s.rows,
                        s.count, Q);
    for (int64_t row = 0; row < s.rows; ++row) differentiate_row(s, row, a);
  }
  [[gnu::noinline]] void differentiate_row(const Strip& s, int64_t row, const Arrays& a) const {
    const int64_t head = s.head_of_call(), place = s.head * rows + row;
    const auto of = [&](const auto& y, int64_t t) { return this->template at<X>(y, s.run(row), t, head, s.first); };
    const X *const x = of(p.x, s.t), *const u = of(p.u, s.t);
    X *const dx = of(p.dx, s.t), *const du_last = p.du_last ? of(p.du_last, s.t) : nullptr;
    X* const m = p.m ? of(p.m, s.t) : nullptr;
    T* const du = a.du[s.t % 2] + place * gates_row + s.first;
    A* const dc = a.dc + place * P_row + s.first;
    const A* const c =
        s.t > 0 ? this->template at<A>(p.c, s.run(row), s.t - 1, head, s.first) : a.first_c + place * P_row + s.first;
    const int64_t c_part = s.t > 0 ? p.c.c : P_room;
    const OutputRow outputs(*this, s, row, a);
    for_each_vector<A>(s.count, [&]<bool kWhole>(int64_t i, int lanes) {
      V x_t[kG], u_t[kG], dx_t[kG], du_t[kG], h{}, to_old{}, dm;
      Carried c_t, dc_t;
      for (int g = 0; g < kG; ++g) {
        x_t[g] = load_lanes<A, kWhole>(x + g * p.x.g + i, lanes);
        u_t[g] = load_lanes<A, kWhole>(u + g * p.u.g + i, lanes);
        fetch_ahead(x + g * p.x.g + i, p.x.l), fetch_ahead(u + g * p.u.g + i, p.u.l);
      }
      for (int k = 0; k < kC; ++k) {
        c_t[k] = load_lanes<A, kWhole>(c + k * c_part + i, lanes);
        fetch_ahead(c + k * c_part + i, p.c.l);
        dc_t[k] = load<A>(dc + k * P_room + i);
      }
      if constexpr (C::kReadsH) h = load_lanes<A, kWhole>(outputs.h + i, lanes);
      if (in.projects())
        dm = load<A>(s.sums + row * kWide + i);
      else
        dm = differentiate_output<kWhole>(s, row, outputs, i, lanes, to_old);
      const V to_h = C::adjoint(x_t, u_t, h, c_t, dm, dc_t, dx_t, du_t);
      for (int g = 0; g < kG; ++g) {
        store_lanes<A, kWhole>(dx + g * p.dx.g + i, dx_t[g], lanes);
        store_lanes<A, kWhole>(du + g * P + i, C::kTwoSides ? du_t[g] : dx_t[g], lanes);
      }
      if constexpr (C::kTwoSides) store_lanes<A, kWhole>(du_last + i, du_t[kG - 1], lanes);
      for (int k = 0; k < kC; ++k) store<A>(dc + k * P_room + i, dc_t[k]);
      if (m) store_lanes<A, kWhole>(m + i, C::step(x_t, u_t, h, c_t), lanes);
      if (direct && !in.projects()) store<A>(outputs.carried + i, to_old + to_h);
    });
  }

  // [return]
  void pass_back(const Strip& s, const Weights& weights, const Arrays& a) const {
    const Left<T> du = {a.du[s.t % 2] + s.head * rows * gates_row, gates_row, 1};
    const Right<T> R = panel(weights.returning, s.head_of_call() * output_strips + s.first / kWide, s.count);
    const int64_t place = s.head * rows * Q_row + s.first;
    A* const dh = a.dh + place;
    if (!in.drops()) {
      multiply_panel<T>(du, R, dh, Q_row, s.rows, s.count, kG * P, direct);
    } else {
      multiply_panel<T>(du, R, s.sums, kWide, s.rows, s.count, kG * P);
      for_each_carried(s, [&](int64_t row, int64_t i) {
        const V back = load<A>(s.sums + row * kWide + i) * load<A>(a.factors + place + row * Q_row + i);
        store<A>(dh + row * Q_row + i, direct ? load<A>(dh + row * Q_row + i) + back : back);
      });
    }
    if (p.grad_clip >= 0) {
      const V limit = splat(static_cast<A>(p.grad_clip));
      for_each_carried(s, [&](int64_t row, int64_t i) {
        const V x = load<A>(dh + row * Q_row + i), below = select(x > limit, limit, x);
        store<A>(dh + row * Q_row + i, select(below < -limit, -limit, below));  // NaN stays
      });
    }
  }
  template <class Body>
  static void for_each_carried(const Strip& s, const Body& body) {
    for (int64_t row = 0; row < s.rows; ++row)
      for (int64_t i = 0; i < s.count; i += kLanes<A>) body(row, i);
  }

  // What lies there of a token that comes soon: processors do not foresee rows that go back in time.
  template <class E>
  void fetch_ahead(const E* from, int64_t token) const {
    prefetch_read(from, (in.sequences.reverse ? kAhead : -kAhead) * token * static_cast<int64_t>(sizeof(E)));
  }
  static constexpr int64_t kAhead = 2;  // tokens

  // ---- weights: panels of `strips` strips of the columns of (H, k, columns)

  void pack_columns(const Panels<T>& panels, const Array& matrix, int64_t columns, int64_t strips) const {
    const int64_t k = panels.k;
    parallel_for(0, in.heads * strips, ceil_div(kWorkOfThread, at_least(1, k * kWide)),
                 [&](int64_t begin, int64_t end) {
                   const bool as_it_is = matrix.dtype == in.x.dtype;
                   Scratch scratch(as_it_is ? 0 : k * kWide * static_cast<int64_t>(sizeof(X)));
                   X* const converted = scratch.take<X>(0);
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t first = i % strips * kWide, n = at_most(kWide, columns - first);
                     const int64_t from = i / strips * k * columns + first;
                     if (as_it_is) {
                       pack_right<T>(static_cast<const X*>(matrix.data) + from, columns, 1, k, n, panels.at(i));
                     } else {
                       for (int64_t j = 0; j < k; ++j) load_array(matrix, from + j * columns, n, converted + j * n);
                       pack_right<T>(converted, n, 1, k, n, panels.at(i));
                     }
                   }
                 });
  }
  // Panel i, of n columns: the last one of a head may be narrow.
  static Right<T> panel(const Panels<T>& panels, int64_t i, int64_t n) { return {panels.at(i), right_room<T>(1, n)}; }

  // ---- states

  // Calls body(run, head of the call, first, count, place) for a member's units or outputs of rows [begin, end).
  template <class Body>
  void for_each_part(const Walk& w, int64_t begin, int64_t end, int64_t strips, int64_t size, int64_t row_size,
                     const Body& body) const {
    this->for_each_strip(w, strips, [&](int64_t head, int64_t strip) {
      const int64_t first = strip * kWide, count = at_most(kWide, size - first);
      for (int64_t row = begin; row < end; ++row)
        body(w.tile.run(row), w.head + head, first, count, (head * rows + row) * row_size + first);
    });
  }
  template <class Body>
  void for_each_units(const Walk& w, int64_t begin, int64_t end, const Body& body) const {
    for_each_part(w, begin, end, unit_strips, P, P_row, body);
  }
  template <class Body>
  void for_each_outputs(const Walk& w, int64_t begin, int64_t end, const Body& body) const {
    for_each_part(w, begin, end, output_strips, Q, Q_row, body);
  }

  // What the first tokens read.
  void load_first(const Walk& w, const Arrays& a) const {
    for_each_units(w, 0, w.tile.count, [&](const Run& run, int64_t head, int64_t first, int64_t count, int64_t place) {
      this->load_carried(run, head, first, count, a.first_c + place, P_room);
    });
    for_each_outputs(w, 0, w.tile.count,
                     [&](const Run& run, int64_t head, int64_t first, int64_t count, int64_t place) {
                       A h[kWide];
                       this->load_hidden(run, head, first, count, h);
                       convert(h, 1, count, a.first_h + place);
                       if (in.drops()) this->load_factors(run, head, first, count, a.factors + place);
                     });
  }

  // Gradients of what rows [begin, end) leave at their end.
  void load_final(const Walk& w, int64_t begin, int64_t end, const Arrays& a) const {
    if (begin == end) return;
    for_each_units(w, begin, end, [&](const Run& run, int64_t head, int64_t first, int64_t count, int64_t place) {
      for (int k = 0; k < kC; ++k) {
        A* const dc = a.dc + k * P_room + place;
        clear(dc, count);
        if (p.dfinal_c && run.final >= 0)
          this->load_state(p.dfinal_c, k * in.sequences.count + run.final, head, P, first, count, dc);
      }
    });
    for_each_outputs(w, begin, end, [&](const Run& run, int64_t head, int64_t first, int64_t count, int64_t place) {
      clear(a.dh + place, count);
      if (p.dfinal_h && run.final >= 0) this->load_state(p.dfinal_h, run.final, head, Q, first, count, a.dh + place);
    });
  }

  void store_initial(const Walk& w, const Arrays& a) const {
    for_each_units(w, 0, w.tile.count, [&](const Run& run, int64_t head, int64_t first, int64_t count, int64_t place) {
      if (!p.dinitial_c || run.initial < 0) return;
      for (int k = 0; k < kC; ++k)
        this->store_state(a.dc + k * P_room + place, p.dinitial_c, k * in.sequences.count + run.initial, head, P, first,
                          count);
    });
    for_each_outputs(w, 0, w.tile.count,
                     [&](const Run& run, int64_t head, int64_t first, int64_t count, int64_t place) {
                       if (p.dinitial_h && run.initial >= 0)
                         this->store_state(a.dh + place, p.dinitial_h, run.initial, head, Q, first, count);
                     });
  }
};

}  // namespace
}  // namespace seqkern::rnn

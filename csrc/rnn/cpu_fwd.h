// The forward pass. Internal to cpu.cpp.
//
// A token is [recur] and [cell] of every strip of units, and with proj a second product of every strip of outputs; the
// members of a team meet after each. What the products read lies as rows of operands: without proj h twice, before and
// after a token; with proj h and m, each of which is read while the other is written.
#pragma once
#include "rnn/cpu_call.h"

namespace seqkern::rnn {
namespace {

template <class C, class X, class T>
struct Forward : Call<C, X, T> {
  using Base = Call<C, X, T>;
  using Base::in, Base::P, Base::Q, Base::P_row, Base::Q_row, Base::P_room, Base::Q_room, Base::heads, Base::rows,
      Base::strips;
  using Base::kG, Base::kC, Base::kWide, Base::kStrip;
  using typename Base::A, typename Base::V, typename Base::Carried;

  const FwdParams& p;

  explicit Forward(const FwdParams& params) : Base(params), p(params) {}

  struct Weights {
    Panels<T> recurrent, projecting;
    A* bias;  // (H, strips, G, kStrip)

    template <class Take>
    void allocate(const Forward& call, const Take& take) {
      const auto operands = [&](int64_t count) { return Base::take_operands(take, count); };
      recurrent = call.recurrent_panels(operands(Panels<T>::room(call.Q, kG * kStrip, call.in.heads * call.strips)));
      if (call.in.projects())
        projecting =
            call.projecting_panels(operands(Panels<T>::room(call.P, kWide, call.in.heads * call.output_strips)));
      bias = take(call.bias_room());
    }
  };

  // Where the numbers of a row's next token lie: those of the walk's first head.
  struct Place {
    const X* x;
    X *u, *h;
    A* c;
  };

  struct Arrays {
    A* h;           // (heads, rows, Q)
    A* c;           // (C, heads, rows, P)
    A* factors;     // (heads, rows, Q): of [dropout]
    T* operand[2];  // (heads, rows, Q): h_{t-1} of even t, and of odd t; with proj h, and m (heads, rows, P)
    A* sums;        // (members, rows, kWide): products of a strip
    Place* places;  // (members, rows)

    template <class Take>
    void allocate(const Forward& call, const Take& take) {
      h = take(call.Q_room), c = take(kC * call.P_room);
      if (call.in.drops()) factors = take(call.Q_room);
      operand[0] = Base::take_operands(take, call.Q_room);
      operand[1] = Base::take_operands(take, call.in.projects() ? call.P_room : call.Q_room);
      sums = take(call.plan.team * call.rows * kWide);
      places = Base::template take_any<Place>(take, call.plan.team * call.rows);
    }
    void clear(const Forward& call) {  // paddings that products read
      __builtin_memset(operand[0], 0, call.Q_room * sizeof(T));
      __builtin_memset(operand[1], 0, (call.in.projects() ? call.P_room : call.Q_room) * sizeof(T));
    }
  };

  void run() const {
    const InScratch<A, Weights> weights(*this);
    this->pack_recurrent(weights.recurrent);
    if (in.projects()) this->pack_projecting(weights.projecting);
    this->load_bias(weights.bias);
    this->template for_each_walk<Arrays>(*this, [&](const Walk& w, const Arrays& a) { walk(w, weights, a); });
  }

  void walk(const Walk& w, const Weights& weights, const Arrays& a) const {
    Place* const places = a.places + w.member.index * rows;
    for (int64_t row = 0; row < w.tile.count; ++row) places[row] = first_place(w.tile.run(row), w.head);
    load_states(w, a);
    w.member.wait();
    int64_t active = w.tile.count;
    for (int64_t t = 0; t < w.tile.longest(); ++t) {
      active = w.tile.active(t, active);
      const auto for_all = [&](int64_t count, int64_t size, const auto& body) {
        this->for_each_strip(w, count, t, [&](int64_t head, int64_t strip) {
          body(Strip{w, head, strip * size, t, active, a.sums + w.member.index * rows * kWide, places});
        });
        w.member.wait();
      };
      if (in.projects()) {
        for_all(strips, kStrip, [&](const Strip& s) { recur(s, a.operand[0], weights, a, a.operand[1]); });
        for_all(this->output_strips, kWide, [&](const Strip& s) { project(s, weights, a, a.operand[0]); });
      } else {
        for_all(strips, kStrip,
                [&](const Strip& s) { recur(s, a.operand[t % 2], weights, a, a.operand[(t + 1) % 2]); });
      }
      for (int64_t row = 0; row < active; ++row) move_on(places[row]);
    }
    store_states(w, a);
  }

  Place first_place(const Run& run, int64_t head) const {
    const auto of = [&]<class E>(const auto& x) { return x ? this->template at<E>(x, run, 0, head, 0) : nullptr; };
    return {
      of.template operator()<const X>(in.x),
      of.template operator()<X>(p.u),
      of.template operator()<X>(p.h),
      of.template operator()<A>(p.c)
    };
  }
  void move_on(Place& place) const {
    const int64_t step = in.sequences.reverse ? -1 : 1;
    place.x += step * in.x.l, place.h += step * p.h.l;
    if (p.u) place.u += step * p.u.l;
    if (p.c) place.c += step * p.c.l;
  }

  // A strip of a head at t: units or outputs from `first` on, of so many rows.
  struct Strip {
    const Walk& w;
    int64_t head, first, t, rows;
    A* sums;  // (rows, kWide)
    const Place* places;

    int64_t head_of_call() const { return w.head + head; }
  };

  // [recur] [cell]; `after`: where m goes, or h without proj.
  void recur(const Strip& s, const T* before, const Weights& weights, const Arrays& a, T* after) const {
    for (int64_t row = 0; row < at_most(kAhead, s.rows); ++row) prefetch(s, row);
    const int64_t panel = s.head_of_call() * strips + s.first / kStrip;
    multiply_panel<T>({before + s.head * rows * Q_row, Q_row, 1}, weights.recurrent[panel], s.sums, kWide, s.rows,
                      kG * kStrip, Q);
    const A* const bias = weights.bias + panel * kG * kStrip;
    for_each_vector<A>(at_most(kStrip, P - s.first),
                       [&]<bool kWhole>(int64_t i, int lanes) { apply_cell<kWhole>(s, i, lanes, bias, a, after); });
  }

  // The gates of a strip's first rows are on their way while it is multiplied, and those of others while the cells of
  // rows before are computed: processors do not foresee rows that lie apart, and many of them find no room in a cache.
  void prefetch(const Strip& s, int64_t row) const {
    constexpr int64_t kLine = 64;
    const int64_t bytes = at_most(kStrip, P - s.first) * static_cast<int64_t>(sizeof(X));
    const X* const x = s.places[row].x + s.head * in.x.h + s.first;
    for (int g = 0; g < kG; ++g)
      for (int64_t byte = 0; byte < bytes; byte += kLine) prefetch_read(x + g * in.x.g, byte);
  }
  static constexpr int64_t kAhead = 8;  // rows

  // Of the vector of units from s.first + i on, in all rows.
  template <bool kWhole>
  [[gnu::noinline]] void apply_cell(const Strip& s, int64_t i, int lanes, const A* bias, const Arrays& a,
                                    T* after) const {
    const int64_t unit = s.first + i, x_place = s.head * in.x.h + unit, u_place = s.head * p.u.h + unit;
    const int64_t c_place = s.head * p.c.h + unit, x_gate = in.x.g, u_gate = p.u.g, c_part = p.c.c;
    const bool keep_u{p.u}, keep_c = kC > 0 && p.c, projects = in.projects();
    const A* sums = s.sums + i;
    A* of_c = a.c + s.head * rows * P_row + unit;
    V b[kG];
    for (int g = 0; g < kG; ++g) b[g] = load<A>(bias + g * kStrip + i);
    for (int64_t row = 0; row < s.rows; ++row, sums += kWide, of_c += P_row) {
      if (i == 0 && row + kAhead < s.rows) prefetch(s, row + kAhead);
      const Place& place = s.places[row];
      V x_t[kG], u_t[kG], h{};
      for (int g = 0; g < kG; ++g) {
        x_t[g] = load_lanes<A, kWhole>(place.x + x_place + g * x_gate, lanes);
        u_t[g] = load<A>(sums + g * kStrip) + b[g];
      }
      if (keep_u)
        for (int g = 0; g < kG; ++g) store_lanes<A, kWhole>(place.u + u_place + g * u_gate, u_t[g], lanes);
      Carried c;
      for (int k = 0; k < kC; ++k) c[k] = load<A>(of_c + k * P_room);
      if constexpr (C::kReadsH) h = load<A>(a.h + (s.head * rows + row) * Q_row + unit);
      const V m = C::step(x_t, u_t, h, c);
      for (int k = 0; k < kC; ++k) store<A>(of_c + k * P_room, c[k]);
      if (keep_c)
        for (int k = 0; k < kC; ++k) store_lanes<A, kWhole>(place.c + c_place + k * c_part, c[k], lanes);
      if (projects)
        store_lanes<A, kWhole>(after + (s.head * rows + row) * P_row + unit, m, lanes);
      else
        finish<kWhole>(s, row, unit, lanes, m, a, after);
    }
  }

  // [proj]
  void project(const Strip& s, const Weights& weights, const Arrays& a, T* after) const {
    const int64_t panel = s.head_of_call() * this->output_strips + s.first / kWide;
    multiply_panel<T>({a.operand[1] + s.head * rows * P_row, P_row, 1}, weights.projecting[panel], s.sums, kWide,
                      s.rows, kWide, P);
    for_each_vector<A>(at_most(kWide, Q - s.first), [&]<bool kWhole>(int64_t i, int lanes) {
      for (int64_t row = 0; row < s.rows; ++row)
        finish<kWhole>(s, row, s.first + i, lanes, load<A>(s.sums + row * kWide + i), a, after);
    });
  }

  // A new value of a vector of outputs [zoneout] goes to memory, is carried, and is what the product of the next token
  // reads [dropout].
  template <bool kWhole>
  [[gnu::always_inline]] void finish(const Strip& s, int64_t row, int64_t output, int lanes, V h, const Arrays& a,
                                     T* after) const {
    const int64_t at = (s.head * rows + row) * Q_row + output;
    if (in.zones()) h = zone_out(s, row, output, load<A>(a.h + at), h);
    store_lanes<A, kWhole>(s.places[row].h + s.head * p.h.h + output, h, lanes);
    store<A>(a.h + at, h);
    if (in.drops()) h *= load<A>(a.factors + at);
    store_lanes<A, kWhole>(after + at, h, lanes);
  }
  V zone_out(const Strip& s, int64_t row, int64_t output, V old, V h) const {
    if (!in.training) return madd(splat(static_cast<A>(in.zoneout)), old, static_cast<A>(1 - in.zoneout) * h);
    return select(this->kept(s.w.tile.run(row), s.t, s.head_of_call(), output) != 0, old, h);
  }

  void load_states(const Walk& w, const Arrays& a) const {
    const int64_t of_outputs = this->output_strip;
    for (int64_t row = 0; row < w.tile.count; ++row) {
      const Run& run = w.tile.run(row);
      this->for_each_strip(w, strips, [&](int64_t head, int64_t strip) {
        const int64_t first = strip * kStrip;
        this->load_carried(run, w.head + head, first, at_most(kStrip, P - first),
                           a.c + (head * rows + row) * P_row + first, P_room);
      });
      this->for_each_strip(w, this->output_strips, [&](int64_t head, int64_t strip) {
        const int64_t first = strip * of_outputs, count = at_most(of_outputs, Q - first);
        const int64_t place = (head * rows + row) * Q_row + first;
        this->load_hidden(run, w.head + head, first, count, a.h + place);
        if (in.drops()) this->load_factors(run, w.head + head, first, count, a.factors + place);
        for_each_vector<A>(count, [&]<bool kWhole>(int64_t i, int lanes) {
          V h = load<A>(a.h + place + i);
          if (in.drops()) h *= load<A>(a.factors + place + i);
          store_lanes<A, kWhole>(a.operand[0] + place + i, h, lanes);
        });
      });
    }
  }

  void store_states(const Walk& w, const Arrays& a) const {
    const int64_t of_outputs = this->output_strip;
    for (int64_t row = 0; row < w.tile.count; ++row) {
      const Run& run = w.tile.run(row);
      if (run.final < 0) continue;
      this->for_each_strip(w, p.final_c ? strips : 0, [&](int64_t head, int64_t strip) {
        const int64_t first = strip * kStrip;
        for (int k = 0; k < kC; ++k)
          this->store_state(a.c + k * P_room + (head * rows + row) * P_row + first, p.final_c,
                            k * in.sequences.count + run.final, w.head + head, P, first, at_most(kStrip, P - first));
      });
      this->for_each_strip(w, p.final_h ? this->output_strips : 0, [&](int64_t head, int64_t strip) {
        const int64_t first = strip * of_outputs;
        this->store_state(a.h + (head * rows + row) * Q_row + first, p.final_h, run.final, w.head + head, Q, first,
                          at_most(of_outputs, Q - first));
      });
    }
  }
};

}  // namespace
}  // namespace seqkern::rnn

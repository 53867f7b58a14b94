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

  struct Arrays {
    A* h;           // (heads, rows, Q)
    A* c;           // (C, heads, rows, P)
    A* factors;     // (heads, rows, Q): of [dropout]
    T* operand[2];  // (heads, rows, Q): h_{t-1} of even t, and of odd t; with proj h, and m (heads, rows, P)
    A* sums;        // (members, rows, kWide): products of a strip

    template <class Take>
    void allocate(const Forward& call, const Take& take) {
      h = take(call.Q_room), c = take(kC * call.P_room);
      if (call.in.drops()) factors = take(call.Q_room);
      operand[0] = Base::take_operands(take, call.Q_room);
      operand[1] = Base::take_operands(take, call.in.projects() ? call.P_room : call.Q_room);
      sums = take(call.plan.team * call.rows * kWide);
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
    load_states(w, a);
    w.member.wait();
    int64_t active = w.tile.count;
    for (int64_t t = 0; t < w.tile.longest(); ++t) {
      active = w.tile.active(t, active);
      const T* const before = in.projects() ? a.operand[0] : a.operand[t % 2];
      T* const after = in.projects() ? a.operand[0] : a.operand[(t + 1) % 2];
      this->for_each_strip(w, strips, [&](int64_t head, int64_t strip) {
        const Strip s{w, head, strip * kStrip, t, active, a.sums + w.member.index * rows * kWide};
        recur(s, before, weights, a, in.projects() ? a.operand[1] : after);
      });
      w.member.wait();
      if (!in.projects()) continue;
      this->for_each_strip(w, this->output_strips, [&](int64_t head, int64_t strip) {
        const Strip s{w, head, strip * kWide, t, active, a.sums + w.member.index * rows * kWide};
        project(s, weights, a, after);
      });
      w.member.wait();
    }
    store_states(w, a);
  }

  // A strip of a head at t: units or outputs from `first` on, of so many rows.
  struct Strip {
    const Walk& w;
    int64_t head, first, t, rows;
    A* sums;  // (rows, kWide)

    int64_t head_of_call() const { return w.head + head; }
  };

  // [recur] [cell]; `after`: where m goes, or h without proj.
  void recur(const Strip& s, const T* before, const Weights& weights, const Arrays& a, T* after) const {
    prefetch(s);
    const int64_t panel = s.head_of_call() * strips + s.first / kStrip;
    multiply_panel<T>({before + s.head * rows * Q_row, Q_row, 1}, weights.recurrent[panel], s.sums, kWide, s.rows,
                      kG * kStrip, Q);
    const A* const bias = weights.bias + panel * kG * kStrip;
    for_each_vector<A>(at_most(kStrip, P - s.first),
                       [&]<bool kWhole>(int64_t i, int lanes) { apply_cell<kWhole>(s, i, lanes, bias, a, after); });
  }

  // The gates of a strip are on their way while it is multiplied: processors do not foresee rows that lie apart.
  void prefetch(const Strip& s) const {
    constexpr int64_t kLine = 64;
    const int64_t bytes = at_most(kStrip, P - s.first) * static_cast<int64_t>(sizeof(X));
    for (int64_t row = 0; row < s.rows; ++row) {
      const X* const x = this->template at<const X>(in.x, s.w.tile.run(row), s.t, s.head_of_call(), s.first);
      for (int g = 0; g < kG; ++g)
        for (int64_t byte = 0; byte < bytes; byte += kLine) prefetch_read(x + g * in.x.g, byte);
    }
  }

  // Of the vector of units from s.first + i on, in all rows.
  template <bool kWhole>
  [[gnu::noinline]] void apply_cell(const Strip& s, int64_t i, int lanes, const A* bias, const Arrays& a,
                                    T* after) const {
    const int64_t head = s.head_of_call(), unit = s.first + i;
    V b[kG];
    for (int g = 0; g < kG; ++g) b[g] = load<A>(bias + g * kStrip + i);
    for (int64_t row = 0; row < s.rows; ++row) {
      const Run& run = s.w.tile.run(row);
      const int64_t place = s.head * rows + row;
      const X* const x = this->template at<const X>(in.x, run, s.t, head, unit);
      V x_t[kG], u_t[kG];
      for (int g = 0; g < kG; ++g) {
        x_t[g] = load_lanes<A, kWhole>(x + g * in.x.g, lanes);
        u_t[g] = load<A>(s.sums + row * kWide + g * kStrip + i) + b[g];
      }
      if (p.u) {
        X* const u = this->template at<X>(p.u, run, s.t, head, unit);
        for (int g = 0; g < kG; ++g) store_lanes<A, kWhole>(u + g * p.u.g, u_t[g], lanes);
      }
      Carried c;
      A* const c_place = a.c + place * P_row + unit;
      for (int k = 0; k < kC; ++k) c[k] = load<A>(c_place + k * P_room);
      const V h = C::kReadsH ? load<A>(a.h + place * Q_row + unit) : V{};
      const V m = C::step(x_t, u_t, h, c);
      for (int k = 0; k < kC; ++k) store<A>(c_place + k * P_room, c[k]);
      if (kC > 0 && p.c) {
        A* const to = this->template at<A>(p.c, run, s.t, head, unit);
        for (int k = 0; k < kC; ++k) store_lanes<A, kWhole>(to + k * p.c.c, c[k], lanes);
      }
      if (in.projects())
        store_lanes<A, kWhole>(after + place * P_row + unit, m, lanes);
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

  // [zoneout] of the new value of a vector of outputs, which goes to memory, is carried, and is what the product of the
  // next token reads [dropout].
  template <bool kWhole>
  void finish(const Strip& s, int64_t row, int64_t output, int lanes, V h, const Arrays& a, T* after) const {
    const Run& run = s.w.tile.run(row);
    const int64_t place = (s.head * rows + row) * Q_row + output;
    if (in.zones()) {
      const V old = load<A>(a.h + place);
      if (in.training)
        h = select(this->kept(run, s.t, s.head_of_call(), output) != 0, old, h);
      else
        h = madd(splat(static_cast<A>(in.zoneout)), old - h, h);
    }
    store_lanes<A, kWhole>(this->template at<X>(p.h, run, s.t, s.head_of_call(), output), h, lanes);
    store<A>(a.h + place, h);
    if (in.drops()) h *= load<A>(a.factors + place);
    store_lanes<A, kWhole>(after + place, h, lanes);
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

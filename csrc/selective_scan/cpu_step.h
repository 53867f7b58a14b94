// One new token per batch row against states that are updated in place. Internal to cpu.cpp.
#pragma once
#include "common/parallel.h"
#include "common/state_row.h"
#include "selective_scan/cpu_plan.h"
#include "selective_scan/cpu_scan.h"
#include "selective_scan/cpu_tile.h"

namespace seqkern::selective_scan {
namespace {

template <class F>
struct Step {
  using A = typename F::A;
  using Number = typename F::Number;
  using PerState = StepParams::PerState;

  const StepParams& p;
  // Vectors of channels run along heads or along the channels of a head.
  const int64_t heads_of_piece = greatest_common_divisor(p.B.heads_per_group, p.C.heads_per_group);
  const bool along_heads = heads_of_piece > p.size;
  const int64_t row_size = along_heads ? heads_of_piece : p.size;
  const int64_t rows = row_size == 0 ? 0 : p.heads * p.size / row_size;
  const int64_t vectors = (row_size + kLanes<A> - 1) / kLanes<A>;
  const int64_t numbers = p.states * F::kWidth;

  // Up to kLanes channels of batch row b: (h, p) onwards.
  struct Channels {
    int64_t b, h, p;
    int lanes;
  };

  struct Arrays {
    A *h, *A_of;  // N numbers
    A *B, *C;     // N, parts: of a batch row and group

    template <class Take>
    void allocate(const Step& step, const Take& take) {
      h = take(step.numbers), A_of = take(step.numbers);
      B = take(step.p.states * F::kParts), C = take(step.p.states * F::kParts);
    }
  };
  using Workspace = InScratch<A, Arrays>;

  void run() const {
    const int64_t work = at_least(1, p.states * kLanes<A>);
    parallel_for(0, p.batch * rows * vectors, kStepGrain / work + 1, [&](int64_t begin, int64_t end) {
      Workspace workspace(*this);
      for (int64_t item = begin, next; item < end; item = next) {  // a batch row and a row of channels at a time
        next = at_most(end, (item / vectors + 1) * vectors);
        const int64_t b = item / vectors / rows, row = item / vectors % rows;
        Channels c{b, row, 0, 0};
        if (along_heads) c.h = row / p.size * heads_of_piece, c.p = row % p.size;
        load_coefficients(p.B, c, workspace.B);
        load_coefficients(p.C, c, workspace.C);
        int64_t& channel = along_heads ? c.h : c.p;
        const int64_t end_channel = channel + row_size;
        channel += item % vectors * kLanes<A>;
        if (const int64_t state = state_row(p, b); state < 0) {
          for (; item < next; ++item, channel += kLanes<A>) {
            c.lanes = static_cast<int>(at_most(kLanes<A>, end_channel - channel));
            store_vector(p.y, c, Vec<A>{});
          }
        } else {
          while (item < next) {
            Token tokens[kTogether];
            int count = 0;
            for (; count < kTogether && item < next; ++count, ++item, channel += kLanes<A>) {
              c.lanes = static_cast<int>(at_most(kLanes<A>, end_channel - channel));
              tokens[count] = read(c);
            }
            for (int i = 0; i < count; ++i) advance_states(tokens[i], state, workspace);
            for (int i = 0; i < count; ++i) write(tokens[i]);
          }
        }
      }
    });
  }

  void load_coefficients(const PerState& from, const Channels& c, A* to) const {
    visit_dtype(from.dtype, [&]<class T>() {
      const T* const data = static_cast<const T*>(from.data) + c.b * from.b + c.h / from.heads_per_group * from.h;
      if (from.n == F::kParts) return convert(data, 1, p.states * F::kParts, to);
      for (int64_t n = 0; n < p.states; ++n)
        for (int part = 0; part < F::kParts; ++part)
          to[n * F::kParts + part] = static_cast<A>(widen(data[n * from.n + part]));
    });
  }

  // Of one vector of channels. kTogether of them go through each stage one after another: the functions in the first
  // and the last are long chains of dependent operations, which overlap this way.
  struct Token {
    Channels c;
    Vec<A> delta, u, sum;
  };
  static constexpr int kTogether = 4;

  Token read(const Channels& c) const {
    Vec<A> delta = load_vector(p.delta, c);
    if (p.delta_bias) delta += load_vector(p.delta_bias, c);
    if (p.softplus) delta = softplus(delta);  // [delta]
    return {c, delta, load_vector(p.u, c), Vec<A>{}};
  }

  void write(const Token& t) const {
    Vec<A> y = t.sum;
    if (p.D) y = madd(load_vector(p.D, t.c), t.u, y);
    if (p.z) y *= silu(load_vector(p.z, t.c));
    store_vector(p.y, t.c, y);
  }

  // Lanes of vectors are states where these fill vectors, else channels. Where the state lies does not matter to this
  // choice: results do not depend on strides.
  void advance_states(Token& t, int64_t row, Workspace& w) const {
    const Vec<A> x = t.delta * t.u;
    if constexpr (F::kParts == 1) {
      if (p.states % kLanes<A> == 0) {
        const bool one = p.states == kLanes<A>;
        t.sum = one ? advance_along_states<kLanes<A>>(t.c, row, t.delta, x, w)
                    : advance_along_states<0>(t.c, row, t.delta, x, w);
        return;
      }
    }
    t.sum = advance_along_channels(t.c, row, t.delta, x, w);
  }

  // kStates: N where it is known when this is compiled, else 0.
  template <int kStates>
  Vec<A> advance_along_states(const Channels& c, int64_t row, Vec<A> delta_of, Vec<A> x_of, Workspace& w) const {
    const int64_t N = kStates ? kStates : p.states;
    const bool two_exp = p.two_exp, tied = p.A.n == 0 && p.A.dtype == p.accumulator;  // one number for all states
    const Rows state = rows_of(p.state, c, row, p.state.n == 1, w.h);
    const Rows A_rows = rows_of(p.A, c, 0, p.A.n == 1 || tied, w.A_of);
    const A *const B = w.B, *const C = w.C;
    alignas(kVectorBytes) A deltas[kLanes<A>], xs[kLanes<A>];
    store<A>(deltas, delta_of * kLog2E<A>);
    store<A>(xs, x_of);
    Vec<A> sums[kLanes<A>];
    A* h = state.data;
    const A* a = A_rows.data;
    const auto advance_channel = [&](int i) {
      const Vec<A> delta = splat(deltas[i]), x = splat(xs[i]);
      Vec<A> decays = tied ? decay<F>(two_exp, delta, splat(*a)) : Vec<A>{}, sum{};
      for (int64_t n = 0; n < N; n += kLanes<A>) {
        prefetch_write(h + n, kPrefetchBytes);
        if (!tied) decays = decay<F>(two_exp, delta, load<A>(a + n));
        const Vec<A> next = madd(decays, load<A>(h + n), x * load<A>(B + n));  // [state]
        store<A>(h + n, next);
        sum = madd(next, load<A>(C + n), sum);  // [out]
      }
      sums[i] = sum;
      h += state.lane, a += A_rows.lane;
    };
    if (c.lanes == kLanes<A>) {
      for (int i = 0; i < kLanes<A>; ++i) advance_channel(i);
    } else {
      for (int i = 0; i < kLanes<A>; ++i) sums[i] = Vec<A>{};
      for (int i = 0; i < c.lanes; ++i) advance_channel(i);
    }
    if (state.data == w.h) scatter(w.h, c, row);
    return sums_of_lanes<A>(sums);
  }

  // The N states of each channel one after another, `lane` apart: in x itself, or else gathered.
  struct Rows {
    A* data;
    int64_t lane;
  };
  Rows rows_of(const PerState& x, const Channels& c, int64_t row, bool in_order, A* gathered) const {
    const Plane first = by_state(x, c, row, 0);
    if (in_order && x.dtype == p.accumulator) return {static_cast<A*>(first.data), first.step};
    for (int64_t n = 0; n < p.states; n += kLanes<A>)
      load_tile<A>(by_state(x, c, row, n), kLanes<A>, c.lanes, gathered + n, p.states);
    return {gathered, p.states};
  }
  void scatter(const A* gathered, const Channels& c, int64_t row) const {
    for (int64_t n = 0; n < p.states; n += kLanes<A>)
      store_tile<A>(gathered + n, by_state(p.state, c, row, n), kLanes<A>, c.lanes, p.states);
  }
  // Lanes are states from n on, elements are channels.
  Plane by_state(const PerState& x, const Channels& c, int64_t row, int64_t n) const {
    const int64_t offset = row * x.b + c.h * x.h + c.p * x.p + n * x.n;
    return plane(x.data, x.dtype, offset, x.n, along_heads ? x.h : x.p);
  }

  Vec<A> advance_along_channels(const Channels& c, int64_t row, Vec<A> delta, Vec<A> x, Workspace& w) const {
    load_states(p.state, c, row, w.h);
    load_states(p.A, c, 0, w.A_of);
    Vec<A> sum{};
    for (int64_t n = 0; n < p.states; ++n) {
      const Number B = F::broadcast(w.B + n * F::kParts, 1), C = F::broadcast(w.C + n * F::kParts, 1);
      const Number a = decay<F>(p.two_exp, delta, scaled(F::load(w.A_of + n * F::kWidth)));
      const Number h = madd(a, F::load(w.h + n * F::kWidth), scale(x, B));  // [state]
      F::store(w.h + n * F::kWidth, h);
      sum = madd_real(C, h, sum);  // [out]
    }
    store_states(w.h, p.state, c, row);
    return F::kParts == 2 ? sum + sum : sum;
  }

  Plane channels(const StepParams::PerChannel& x, const Channels& c) const {
    return plane(x.data, x.dtype, c.b * x.b + c.h * x.h + c.p * x.p, along_heads ? x.h : x.p, 0);
  }
  Vec<A> load_vector(const StepParams::PerChannel& from, const Channels& c) const {
    const Plane at = channels(from, c);
    if (at.lane == 1 && at.dtype == p.accumulator) return load<A>(static_cast<const A*>(at.data), c.lanes);
    A vector[kLanes<A>];
    load_tile<A>(at, c.lanes, 1, vector);
    return load<A>(vector);
  }
  void store_vector(const StepParams::PerChannel& to, const Channels& c, Vec<A> value) const {
    const Plane at = channels(to, c);
    if (at.lane == 1 && at.dtype == p.accumulator) return store<A>(static_cast<A*>(at.data), value, c.lanes);
    A vector[kLanes<A>];
    store<A>(vector, value);
    store_tile<A>(vector, at, c.lanes, 1);
  }

  // Calls body(plane, count, offset, row) for the planes that all states of the channels lie in: one, or one per part.
  template <class Body>
  void for_each_plane(const PerState& x, const Channels& c, int64_t row, const Body& body) const {
    const int64_t offset = row * x.b + c.h * x.h + c.p * x.p, lane = along_heads ? x.h : x.p;
    if (x.n == F::kParts) return body(plane(x.data, x.dtype, offset, lane, 1), p.states * F::kParts, 0, kLanes<A>);
    for (int part = 0; part < F::kParts; ++part)
      body(plane(x.data, x.dtype, offset + part, lane, x.n), p.states, part * kLanes<A>, F::kWidth);
  }
  void load_states(const PerState& from, const Channels& c, int64_t row, A* to) const {
    for_each_plane(from, c, row, [&](const Plane& states, int64_t count, int64_t offset, int64_t stride) {
      load_tile<A>(states, c.lanes, count, to + offset, stride);
    });
  }
  void store_states(const A* from, const PerState& to, const Channels& c, int64_t row) const {
    for_each_plane(to, c, row, [&](const Plane& states, int64_t count, int64_t offset, int64_t stride) {
      store_tile<A>(from + offset, states, c.lanes, count, stride);
    });
  }

  static constexpr int64_t kStepGrain = 1 << 17;  // states worth another thread
  static constexpr int64_t kPrefetchBytes = 2048;
};

}  // namespace
}  // namespace seqkern::selective_scan

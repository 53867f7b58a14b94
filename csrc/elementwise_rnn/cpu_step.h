// One new token per batch row against states that are updated in place. Internal to cpu.cpp.
#pragma once
#include "common/parallel.h"
#include "common/slstm_state.h"
#include "common/state_row.h"
#include "elementwise_rnn/cpu_call.h"

namespace seqkern::elementwise_rnn {
namespace {

// C is a cell of vectors.
template <class C, class A>
struct Step {
  using V = Vec<A>;
  using Rows = StepParams::Rows;
  static constexpr int kStates = C::kStates, kPublished = C::kPublishesState ? kStates : 4;
  static constexpr int64_t kStrip = 16 * kLanes<A>;  // channels that are worked on together

  const StepParams& p;
  const int64_t strips = ceil_div(p.channels, kStrip);

  // Rows of a strip. Whole vectors are read and written, so lanes beyond the last channel hold some number.
  struct Workspace {
    A weights[C::kWeights][kStrip] = {}, x[C::kGates][kStrip] = {}, state[kPublished][kStrip] = {};
    int64_t first = -1;  // channel whose weights these are
  };

  // Strip after strip, so that weights are read once.
  void run() const {
    parallel_for(0, strips * p.batch, kStepGrain / kStrip, [&](int64_t begin, int64_t end) {
      Workspace workspace;
      for (int64_t item = begin; item < end; ++item) advance(item % p.batch, item / p.batch * kStrip, workspace);
    });
  }

  void advance(int64_t b, int64_t first, Workspace& w) const {
    const int64_t count = at_most(kStrip, p.channels - first), row = state_row(p, b);
    if (row < 0) {
      clear(w.x[0], kStrip);
      return store_part(w.x[0], p.h, b, first, count);
    }
    if (w.first != first) {
      for (int i = 0; i < C::kWeights; ++i) load_array(p.weights, i * p.channels + first, count, w.weights[i]);
      w.first = first;
    }
    for (int i = 0; i < C::kGates; ++i) load_strided(p.x, b * p.x.b + i * p.x.g + first, 1, count, w.x[i]);
    for (int i = 0; i < kPublished; ++i) {
      const Rows& state = p.state[i];
      load_strided(state, row * state.b + first * state.d, state.d, count, w.state[i]);
    }
    for (int64_t d = 0; d < count; d += kLanes<A>) {
      V weights[C::kWeights], x[C::kGates], s[kStates];
      load_vectors<A>(w.weights[0] + d, kStrip, weights);
      load_vectors<A>(w.x[0] + d, kStrip, x);
      take_state(w, d, s);
      C::step(weights, x, s);  // [cell]
      put_state(s, d, w);
    }
    for (int i = 0; i < kPublished; ++i) store_part(w.state[i], p.state[i], row, first, count);
    store_part(w.state[0], p.h, b, first, count);
  }

  static void store_part(const A* from, const Rows& to, int64_t row, int64_t first, int64_t count) {
    store_strided(from, to, row * to.b + first * to.d, to.d, count);
  }

  // What the state of a step holds is what a cell carries, but for sLSTM: there (h, c, n, m) is (h, y, l).
  static void take_state(const Workspace& w, int64_t d, V (&s)[kStates]) {
    if constexpr (C::kPublishesState) {
      load_vectors<A>(w.state[0] + d, kStrip, s);
    } else {
      s[0] = load<A>(w.state[0] + d);
      SlstmState<A>::carry(load<A>(w.state[1] + d), load<A>(w.state[2] + d), load<A>(w.state[3] + d), s[1], s[2]);
    }
  }
  static void put_state(const V (&s)[kStates], int64_t d, Workspace& w) {
    if constexpr (C::kPublishesState) {
      store_vectors<A>(s, w.state[0] + d, kStrip);
    } else {
      V parts[kPublished] = {s[0]};
      SlstmState<A>::show(s[1], s[2], parts[1], parts[2], parts[3]);
      store_vectors<A>(parts, w.state[0] + d, kStrip);
    }
  }

  static constexpr int64_t kStepGrain = 1 << 13;  // channels worth another thread
};

}  // namespace
}  // namespace seqkern::elementwise_rnn

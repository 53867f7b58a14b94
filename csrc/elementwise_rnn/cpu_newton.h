// The forward by Newton's method with unknowns at every token of a tile. Internal to cpu.cpp.
#pragma once
#include "elementwise_rnn/cpu_solve.h"

namespace seqkern::elementwise_rnn {
namespace {

// Tile by tile of a run's tokens, from the state that enters it:
//   s_t = f_t + J_t (change of s_{t-1}),  f_t and J_t of the s_{t-1} before, until nothing changes
// and then [estimate] of the states that this gives e_t = |J_t| e_{t-1} + |f_t - s_t|.
template <class C, class A>
struct Newton : Iterative<C, A> {
  using Base = Iterative<C, A>;
  using Base::in, Base::width, Base::L, Base::kG, Base::kW, Base::kS, Base::p;
  using typename Base::V;

  explicit Newton(const FwdParams& params) : Base(params, width_of_block(params), kSweeps) {}

  struct Arrays : Forward<C, A>::Arrays {
    A* gates;                       // (kTile, kG, width)
    A* states;                      // (1 + kTile, kS, width): what enters the tile, and of its tokens
    A* e;                           // (kS, width): of the state before the tile
    A *sweeps, *estimate, *failed;  // (width), of the row so far

    template <class Take>
    void allocate(const Newton& call, const Take& take) {
      Forward<C, A>::Arrays::allocate(call, take);
      gates = take(kTile * kG * call.width), states = take((1 + kTile) * kS * call.width), e = take(kS * call.width);
      sweeps = take(call.width), estimate = take(call.width), failed = take(call.width);
    }
  };
  using Workspace = InScratch<A, Arrays>;

  void run() const {
    const int64_t blocks = this->num_blocks();
    parallel_for(0, in.sequences.batch * blocks, kGrain / at_least(1, width * L) + 1, [&](int64_t begin, int64_t end) {
      const Workspace workspace(*this);
      for (int64_t i = begin; i < end; ++i) solve_row(i / blocks, this->block(i % blocks), workspace);
    });
  }

  void solve_row(int64_t b, const Block& block, const Arrays& a) const {
    this->load_weights(block, a.w);
    clear(a.sweeps, width), clear(a.estimate, width), clear(a.failed, width);
    this->for_each_run(b, 0, L, [&](const Run& run, int64_t from, int64_t to) {
      this->load_initial_state(run, block, a.states);
      clear(a.e, kS * width);
      for (int64_t q = from; q < to; q += kTile) solve_tile(b, q, at_most(kTile, to - q), block, a);
      this->store_final_state(run, to, a.states, block);
    });
    this->store_stats(b, block, a.sweeps, a.estimate, a.failed);
    if (this->any(a.failed, block)) this->repair(b, 0, block, a, a.failed);
  }

  void solve_tile(int64_t b, int64_t q, int64_t tokens, const Block& block, const Arrays& a) const {
    const Tile<const A> x = this->template load_tile<kG>(in.x, b, q, tokens, block, a.gates);
    const Tile<A> states = this->template in_scratch<kS>(a.states);
    for (int64_t d = 0; d < block.count; d += kLanes<A>) {
      V w[kW];
      load_vectors<A>(a.w + d, width, w);
      iterate(tokens, d, w, x, states, a);
      verify(tokens, d, w, x, states, a);
    }
    if (p.checkpoints)
      for (int64_t t = 0; t < tokens; ++t)
        if (const int64_t j = this->piece(q + t); q + t == this->first_of_piece(j))
          this->store_checkpoint(states.at(t), p.checkpoints, b, j, block);
    this->template store_tile<1>({states.at(1), states.token, width}, this->h, b, q, tokens, block);
    copy(states.at(tokens), kS * width, states.at(0));
  }

  void iterate(int64_t tokens, int64_t d, const V (&w)[kW], const Tile<const A>& x, const Tile<A>& states,
               const Arrays& a) const {
    for (int64_t t = 0; t < tokens; ++t) {
      V x_t[kG], s[kS];
      load_vectors(x.at(t) + d, x.part, x_t);
      C::empty(s);
      C::step(w, x_t, s);
      store_vectors<A>(s, states.at(t + 1) + d, width);
    }
    Mask<V> active = load<A>(a.failed + d) == 0;
    V sweeps{};
    for (int64_t k = 0; k < this->max_sweeps && any_lane(active); ++k) {
      Mask<V> settled = ~Mask<V>{};
      V before[kS], delta[kS] = {};
      load_vectors<A>(states.at(0) + d, width, before);
      for (int64_t t = 0; t < tokens; ++t) {
        V x_t[kG], old[kS], next[kS], J[kS][kS], size[kS];
        load_vectors(x.at(t) + d, x.part, x_t);
        load_vectors<A>(states.at(t + 1) + d, width, old);
        C::tangent(w, x_t, before, J);
        correct(J, delta, before, next);
        for (int i = 0; i < kS; ++i) {
          next[i] = select(active, next[i], old[i]);
          delta[i] = change(next[i], old[i]), size[i] = magnitude(delta[i]), before[i] = old[i];
        }
        settled &= this->tolerates(size, next);
        store_vectors<A>(next, states.at(t + 1) + d, width);
      }
      sweeps = select(active, V{} + static_cast<A>(k + 1), sweeps);
      active &= ~settled;
    }
    store<A>(a.sweeps + d, larger(sweeps, load<A>(a.sweeps + d)));
  }

  // [estimate]
  void verify(int64_t tokens, int64_t d, const V (&w)[kW], const Tile<const A>& x, const Tile<A>& states,
              const Arrays& a) const {
    Mask<V> good = ~Mask<V>{};
    V s[kS], e[kS], largest{};
    load_vectors<A>(states.at(0) + d, width, s);
    load_vectors<A>(a.e + d, width, e);
    for (int64_t t = 0; t < tokens; ++t) {
      V x_t[kG], f[kS], J[kS][kS], before[kS];
      load_vectors(x.at(t) + d, x.part, x_t);
      for (int i = 0; i < kS; ++i) f[i] = s[i], before[i] = e[i];
      C::tangent(w, x_t, f, J);
      load_vectors<A>(states.at(t + 1) + d, width, s);
      amplify(J, before, e);
      const Mask<V> differs = any_error(before);  // states that are equal are rounded alike
      for (int i = 0; i < kS; ++i) {
        e[i] += magnitude(change(f[i], s[i]));
        e[i] = select(differs, larger(e[i], this->rounding(s[i])), e[i]);
      }
      good &= this->tolerates(e, s);
      largest = this->largest(e, largest);
    }
    store_vectors<A>(e, a.e + d, width);
    const V failed = load<A>(a.failed + d);
    const V estimate = load<A>(a.estimate + d);
    store<A>(a.estimate + d, select(failed != 0, estimate, larger(largest, estimate)));
    store<A>(a.failed + d, select(good, failed, V{} + 1));
  }

  static bool any_lane(Mask<V> mask) {
    bool any = false;
    for (int i = 0; i < kLanes<A>; ++i) any |= mask[i] != 0;
    return any;
  }

  static int64_t width_of_block(const FwdParams& p) { return at_most(channels_of_block<A>(p), kWidest); }

  static constexpr int64_t kSweeps = 10;
  static constexpr int64_t kTile = 32;        // tokens
  static constexpr int64_t kWidest = 64;      // channels
  static constexpr int64_t kGrain = 1 << 13;  // channels of tokens worth another thread
};

}  // namespace
}  // namespace seqkern::elementwise_rnn

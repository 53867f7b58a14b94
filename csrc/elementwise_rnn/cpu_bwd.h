// The backward pass: the states of a piece are computed again from its checkpoint, then differentiated last to first.
// dweights are summed over a piece, then over a slab of runs, then over the slabs in order. Internal to cpu.cpp.
#pragma once
#include "common/parallel.h"
#include "elementwise_rnn/cpu_call.h"

namespace seqkern::elementwise_rnn {
namespace {

template <class C, class A_>
struct Backward : Call<C, A_> {
  using A = A_;
  using typename Call<C, A>::V;
  using Call<C, A>::kG, Call<C, A>::kW, Call<C, A>::kS, Call<C, A>::width;

  const BwdParams& p;
  const int64_t slabs = num_slabs(p), blocks = this->num_blocks();
  A* const partials = static_cast<A*>(p.workspace);  // (slabs, W, D)

  explicit Backward(const BwdParams& params)
      : Call<C, A>(params, at_most(kWidest, channels_of_block<A>(params))), p(params) {}

  struct Arrays {
    A *weights, *dweights;  // (W, width)
    A* ds;                  // (S, width): of the state after a token
    A* states;              // (kKept, S, width): before each token of a piece
    A *x, *dh;              // (kKept, G, width), then dx; (kKept, width): where x and dh are not read in place

    template <class Take>
    void allocate(const Backward& call, const Take& take) {
      weights = take(kW * call.width), dweights = take(kW * call.width), ds = take(kS * call.width);
      states = take(kKept * kS * call.width);
      x = take(kKept * kG * call.width), dh = take(kKept * call.width);
    }
  };
  using Workspace = InScratch<A, Arrays>;

  void run() const {
    const int64_t tokens = p.sequences.batch * this->L / at_least(1, slabs);
    parallel_for(0, slabs * blocks, kGrain / at_least(1, tokens * width) + 1, [&](int64_t begin, int64_t end) {
      Workspace workspace(*this);
      for (int64_t item = begin; item < end; ++item)
        differentiate_slab(item % slabs, this->block(item / slabs), workspace);
    });
    if (p.dweights) reduce_slabs();
  }

  void differentiate_slab(int64_t slab, const Block& block, Workspace& w) const {
    this->load_weights(block, w.weights);
    clear(w.dweights, kW * width);
    for (int64_t r = slab * p.num_runs / slabs; r < (slab + 1) * p.num_runs / slabs; ++r)
      differentiate_run(p.runs[r], block, w);
    if (!p.dweights) return;
    const Tile<A> to{partials + slab * kW * p.channels + block.first, 0, p.channels};
    store_rows(this->template in_scratch<kW>(w.dweights), 1, kW, block.count, to);
  }

  void differentiate_run(const Run& run, const Block& block, Workspace& w) const {
    const int64_t N = p.sequences.count, begin = this->first(run);
    if (p.dfinal_state && run.final >= 0)
      this->load_state(p.dfinal_state, N, run.final, block, w.ds);
    else
      clear(w.ds, kS * width);
    for (int64_t end = this->last(run); end > begin;) {
      const int64_t j = this->piece(end - 1), first = at_least(begin, this->first_of_piece(j));
      if (first == begin)
        this->load_initial_state(run, block, w.states);
      else
        this->load_checkpoint(p.checkpoints, run.b, j, block, w.states);
      differentiate_piece(run.b, first, end - first, block, w);
      end = first;
    }
    if (p.dinitial_state && run.initial >= 0) this->store_state(w.ds, p.dinitial_state, N, run.initial, block);
  }

  void differentiate_piece(int64_t b, int64_t q, int64_t tokens, const Block& block, Workspace& w) const {
    const Tile<const A> x = this->template load_tile<kG>(p.x, b, q, tokens, block, w.x);
    const Tile<const A> dh = this->template load_tile<1>(one_gate(p.dh), b, q, tokens, block, w.dh);
    const Tile<A> dx = this->template tile_of<kG>(p.dx, b, q, block, w.x);
    const Tile<A> states = this->template in_scratch<kS>(w.states);
    for (int64_t t = 0; t + 1 < tokens; ++t)
      for (int64_t d = 0; d < block.count; d += kLanes<A>) {
        V w_d[kW], x_t[kG], s_t[kS];
        load_vectors<A>(w.weights + d, width, w_d);
        load_vectors<A>(x.at(t) + d, x.part, x_t);
        load_vectors<A>(states.at(t) + d, width, s_t);
        C::step(w_d, x_t, s_t);  // [cell]
        store_vectors<A>(s_t, states.at(t + 1) + d, width);
        prefetch_before<kG>(x, t, d), prefetch_before<1>(dh, t, d);
      }
    const FlushSubnormals flush;  // which gradients that fade become, and stay for long
    for (int64_t d = 0; d < block.count; d += kLanes<A>) {
      V w_d[kW], ds[kS], dw[kW] = {}, sums[kW];
      load_vectors<A>(w.weights + d, width, w_d);
      load_vectors<A>(w.ds + d, width, ds);
      for (int64_t t = tokens; t-- > 0;) {
        V x_t[kG], s_t[kS], dx_t[kG];
        load_vectors<A>(x.at(t) + d, x.part, x_t);
        load_vectors<A>(states.at(t) + d, width, s_t);
        ds[0] += load<A>(dh.at(t) + d);
        C::adjoint(w_d, x_t, s_t, ds, dx_t, dw);  // [adjoint]
        store_vectors<A>(dx_t, dx.at(t) + d, dx.part);
      }
      store_vectors<A>(ds, w.ds + d, width);
      load_vectors<A>(w.dweights + d, width, sums);
      for (int i = 0; i < kW; ++i) sums[i] += dw[i];
      store_vectors<A>(sums, w.dweights + d, width);
    }
    this->template store_tile<kG>(dx, p.dx, b, q, tokens, block);
  }

  // Of a piece that is read in place, the same token of the one before it, which comes next: processors do not foresee
  // rows that go back in time.
  template <int kRows>
  static void prefetch_before(const Tile<const A>& piece, int64_t t, int64_t d) {
    for (int i = 0; i < kRows; ++i)
      prefetch_read(piece.at(t, i) + d, -kKept * piece.token * static_cast<int64_t>(sizeof(A)));
  }

  void reduce_slabs() const {
    const int64_t numbers = kW * p.channels;
    parallel_for(0, ceil_div(numbers, kStrip), 16, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * kStrip; first < at_most(numbers, end * kStrip); first += kStrip) {
        const int64_t count = at_most(kStrip, numbers - first);
        A sums[kStrip] = {};
        for (int64_t slab = 0; slab < slabs; ++slab)
          for (int64_t i = 0; i < count; ++i) sums[i] += partials[slab * numbers + first + i];
        store_array(sums, count, p.dweights, first);
      }
    });
  }

  static constexpr int64_t kWidest = 128;  // channels of a block, whose piece lies in scratch memory
  static constexpr int64_t kStrip = 64;
  static constexpr int64_t kGrain = 1 << 13;  // tokens of a channel worth another thread
};

}  // namespace
}  // namespace seqkern::elementwise_rnn

// The serial forward [cell], token by token, with as many vectors of channels in flight as a block has. Internal to
// cpu.cpp.
#pragma once
#include "elementwise_rnn/cpu_call.h"

namespace seqkern::elementwise_rnn {
namespace {

template <class C, class A>
struct Forward : Call<C, A> {
  using Base = Call<C, A>;
  using Base::in, Base::width, Base::kG, Base::kW, Base::kS;
  using typename Base::V;

  const FwdParams& p;
  const GateData h = one_gate(p.h);  // (B, L, 1, D)
  // Of a tile, which stays in the first-level cache.
  const int64_t tile_tokens = at_least(1, at_most(kKept, kTileNumbers / (kG * this->width)));

  Forward(const FwdParams& params, int64_t width) : Base(params, width), p(params) {}

  struct Arrays {
    A *w, *s;    // (kW, width), (kS, width)
    A *x, *out;  // (tile_tokens, kG, width), (tile_tokens, width)

    template <class Take>
    void allocate(const Forward& call, const Take& take) {
      w = take(kW * call.width), s = take(kS * call.width);
      x = take(call.tile_tokens * kG * call.width), out = take(call.tile_tokens * call.width);
    }
  };
  using Workspace = InScratch<A, Arrays>;

  void run() const {
    if (in.channels == 0) return;
    const auto make = [&] { return Workspace(*this); };
    for_all_runs(in, this->num_blocks(), kGrain / width + 1, make, [&](int64_t r, int64_t i, const Workspace& a) {
      const Run& run = in.runs[r];
      const Block block = this->block(i);
      this->load_weights(block, a.w);
      this->load_initial_state(run, block, a.s);
      advance(run.b, this->first(run), this->last(run), block, a);
      if (p.final_state && run.final >= 0) this->store_state(a.s, p.final_state, in.sequences.count, run.final, block);
    });
    clear_stats();
  }

  // Positions [q, end) of row b, of one run: a.s is the state before, and then the state after. Of `marked` channels
  // only, where those are given, anything is written.
  void advance(int64_t b, int64_t q, int64_t end, const Block& block, const Arrays& a,
               const A* marked = nullptr) const {
    for_each_tile(b, q, end, block, a, marked,
                  [&](int64_t tokens, const auto& x, const auto& out) { advance(tokens, block, a.w, x, a.s, out); });
  }

  // Calls body(tokens, x, out), which moves a.s on, for tiles within pieces.
  template <class Body>
  void for_each_tile(int64_t b, int64_t q, int64_t end, const Block& block, const Arrays& a, const A* marked,
                     const Body& body) const {
    for (int64_t tokens; q < end; q += tokens) {
      const int64_t j = this->piece(q);
      tokens = at_most(at_most(end, this->last_of_piece(j)) - q, tile_tokens);
      if (p.checkpoints && q == this->first_of_piece(j))
        this->store_checkpoint(a.s, p.checkpoints, b, j, block, marked);
      if (this->has_whole_vectors(block) && !marked) {
        visit_data<A>(in.x.dtype, [&]<class T>() {
          body(tokens, this->template in_memory<const T>(in.x, b, q, block),
               this->template in_memory<T>(h, b, q, block));
        });
      } else {
        const Tile<A> out = this->template in_scratch<1>(a.out);
        body(tokens, this->template load_tile<kG>(in.x, b, q, tokens, block, a.x), out);
        this->template store_tile<1>(out, h, b, q, tokens, block, marked);
      }
    }
  }

  // [cell]
  template <class T, class U>
  void advance(int64_t tokens, const Block& block, const A* w, const Tile<T>& x, A* s, const Tile<U>& out) const {
    // Processors do not foresee the gates of tokens to come: those of the next one where rows are long, and farther
    // where they are short.
    const int64_t ahead = at_least(1, kAhead / width);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t d = 0; d < block.count; d += kLanes<A>) {
        V w_d[kW], x_t[kG], s_t[kS];
        load_vectors<A>(w + d, width, w_d);
        load_vectors(x.at(t) + d, x.part, x_t);
        load_vectors<A>(s + d, width, s_t);
        for (int i = 0; i < kG; ++i) prefetch_read(x.at(t + ahead, i) + d, 0);
        C::step(w_d, x_t, s_t);
        store_vectors<A>(s_t, s + d, width);
        store<A>(out.at(t) + d, s_t[0]);
      }
  }

  void clear_stats() const {
    const auto count = static_cast<size_t>(in.sequences.batch * in.channels);
    if (p.stats.sweeps) __builtin_memset(p.stats.sweeps, 0, count * sizeof *p.stats.sweeps);
    if (p.stats.estimate) __builtin_memset(p.stats.estimate, 0, count * sizeof *p.stats.estimate);
    if (p.stats.repaired) __builtin_memset(p.stats.repaired, 0, count * sizeof *p.stats.repaired);
  }

  static constexpr int64_t kTileNumbers = 6144;
  static constexpr int64_t kGrain = 1 << 13;  // channels of tokens worth another thread
  static constexpr int64_t kAhead = 256;      // channels of tokens
};

}  // namespace
}  // namespace seqkern::elementwise_rnn

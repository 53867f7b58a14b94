// The walk of the backward: the loop over chunks, forward and then backward.
#pragma once

#include "linear_attention/bwd_base.cuh"

namespace seqkern::linear_attention::cuda {

// The loop over chunks, forward and then backward. `Decays` is a WalkBase that knows the decays: load_decays, scale,
// total, flow_maxima, process (of a chunk all products but those with scaled q and k), and write_gates.
template <typename Decays>
struct Walk : Decays {
  using Decays::Decays, Decays::p, Decays::plan, Decays::shared, Decays::place;
  using typename Decays::R, typename Decays::State;
  static constexpr int kC = Decays::kTokens;

  __device__ __forceinline__ void run() {
    const bool walks = this->pass == kWalk;
    this->for_each_key([&](int key) {
      shared.bonus[key] = p.bonus && key < p.keys ? load<R>(p.bonus, place.h * p.keys + key) : R(0);
    });
    if (walks && place.segment == 0) this->clear_shared_sums();
#pragma unroll 1
    for (int direction = 0; direction < 2; ++direction) walk(direction == 1, walks);
    if (walks) this->store_parameters();
  }

 private:
  // Forward, for the states before chunks, or backward, for everything else.
  __device__ __forceinline__ void walk(bool back, bool walks) {
    const Stretch& stretch = place.stretch;
    const bool takes_dot = !back && walks && p.dfinal_state.m;
    const bool has_tokens = place.span.begin < place.span.end;
    // First the final state, for its product with its gradient.
    bool whole = takes_dot && plan.segments > 1 && has_tokens;
    // A row without tokens passes the gradient of its state on.
    bool empty = back && walks && place.segment == 0 && (p.sequences.seq_idx || !has_tokens);
    State S;  // or dS
    S.clear();
    R decay = R(1);
    this->load_sums(back ? shared.dz : shared.z, {}, -1);
    Chunk chunk{};
    int64_t at = back ? stretch.end : stretch.begin;
    while (whole || empty || (back ? at > stretch.begin : at < stretch.end)) {
      const bool none = back && at == stretch.begin, at_edge = at == (back ? stretch.end : stretch.begin);
      chunk = none   ? Chunk{at, 0, true, false}
              : back ? chunk_before<kC>(p.sequences, place, at, chunk)
                     : chunk_at<kC>(p.sequences, stretch, at);
      if (!whole) at = back ? chunk.begin : chunk.begin + chunk.count;
      if (chunk.padding) {
        if (back && walks) this->clear_outputs(chunk);
        continue;
      }
      empty = false;
      const bool first = none || place.is_first(p.sequences, chunk), last = none || place.is_last(p.sequences, chunk);
      if (whole || at_edge || (back ? last : first)) {
        const int64_t row = back ? (none || !last ? stretch.state : this->final_row_of(chunk))
                                 : this->entering_row(first ? chunk.begin : place.span.begin);
        this->enter(S, back, walks ? row : -1,
                    !walks  ? 0
                    : whole ? plan.segments
                    : back  ? plan.segments - 1 - place.segment
                            : place.segment);
      }
      if (!whole && !none) {
        if (!back && !first) this->keep(S, chunk);
        this->load_rows(chunk, back ? 0 : 1, back && !walks ? 0 : 2);
        if (back && walks) this->load_operand(chunk, first);
        commit_copies();
        this->load_decays(chunk, first);
        if (back) this->load_values(chunk);
        wait_copies<0>();
        __syncthreads();
        if (back) this->flow_maxima(chunk, first);
        if (back && walks) {
          if (p.bonus) this->read_bonus();
          this->process(S, chunk);
        }
        this->scale(back, !back || walks);
        __syncthreads();
        if (back && walks) {
          this->write_gates(chunk, first);
          this->dv(chunk);
        }
        carry(S, back, chunk);
        this->for_each_key([&](int key) { decay *= this->total(key); });
        __syncthreads();
        if (back && walks) this->store_values(chunk);
      }
      if (takes_dot && (whole || (plan.segments == 1 && last)))
        this->dot_final(S, whole ? stretch.state : this->final_row_of(chunk));
      if (back && walks && first)
        this->leave(S, none ? this->given_row(stretch.state) : this->entering_row(chunk.begin), !none);
      __syncthreads();
      whole = false;
    }
    if (walks) return;
    auto& e = this->element(place.segment);
    R* const to_states = back ? e.dS : e.S;
    this->in_order(S, [&](int i, int, R& s) { store(to_states + i, s); });
    this->for_each_key([&](int key) {
      store((back ? e.dz : e.z) + key, (back ? shared.dz : shared.z)[key]);
      store(&e.decay[key], decay);
    });
    if (threadIdx.x == 0) store(&e.dm, this->dm_later), store(&e.passes, this->passes);
  }

  // [carry] with scaled k and v, [dcarry] with scaled q and dn
  __device__ __forceinline__ void carry(State& S, bool back, const Chunk& chunk) {
    const auto& keys = back ? shared.q : shared.k;
    const auto& values = back ? shared.dn : shared.v;
    S.for_each([&](int key, int, R& s) { s *= this->total(key); });
    S.template add<kTransposed, kPlain>(keys, values, 0, this->depth(chunk), this->exact);
    if (!this->normalized()) return;
    R* const sums = back ? shared.dz : shared.z;
    this->for_each_key([&](int key) {
      R z = this->total(key) * sums[key];
      for (int i = 0; i < chunk.count; ++i) z = fma(back ? shared.de[i] : R(1), to<R>(keys[i][key]), z);
      sums[key] = z;
    });
  }
};

}  // namespace seqkern::linear_attention::cuda

// What forward and backward share on the device: the cell of a channel, its weights and states, the gates of its
// tokens.
#pragma once

#include <tuple>

#include "common/time_scan.cuh"
#include "elementwise_rnn/cells.h"
#include "elementwise_rnn/tile.h"

namespace seqkern::elementwise_rnn::cuda {

// Kernels are templates over the index of a cell.
template <int kCell, typename R>
using CellOf = std::tuple_element_t<kCell, std::tuple<Gru<R>, Lstm<R>, Slstm<R>, IndRnn<R>, Elman<R>>>;

template <typename R, int kStates>
struct State {
  R s[kStates];
};

// (W, D)
template <typename R, int kWeights>
__device__ __forceinline__ void load_weights(R (&w)[kWeights], const Inputs& in, const time_scan::Place& place) {
#pragma unroll
  for (int i = 0; i < kWeights; ++i) w[i] = place.exists ? load<R>(in.weights, i * in.channels + place.channel) : R(0);
}

// Of (S, N, D), row `row`.
template <typename R, int kStates>
__device__ __forceinline__ void load_state(State<R, kStates>& state, const Array& states, const Inputs& in,
                                           const time_scan::Place& place, int64_t row) {
#pragma unroll
  for (int i = 0; i < kStates; ++i)
    state.s[i] = load<R>(states, (i * in.sequences.count + row) * in.channels + place.channel);
}
template <typename R, int kStates>
__device__ __forceinline__ void store_state(const State<R, kStates>& state, const Array& states, const Inputs& in,
                                            const time_scan::Place& place, int64_t row) {
#pragma unroll
  for (int i = 0; i < kStates; ++i)
    store(states, (i * in.sequences.count + row) * in.channels + place.channel, state.s[i]);
}

// Where number `i` of the checkpoint of a piece lies in (S, B, pieces, D).
__device__ __forceinline__ int64_t checkpoint_at(const Inputs& in, const time_scan::Place& place, int i,
                                                 int64_t piece) {
  return ((i * in.sequences.batch + place.b) * pieces(in) + piece) * in.channels + place.channel;
}

// The sequences, which are never those of seq_idx. Said to the compiler, which then makes code for what there is.
__device__ __forceinline__ Sequences sequences_of(const Inputs& in) {
  Sequences s = in.sequences;
  s.seq_idx = nullptr;
  return s;
}

// The gates of a chunk of tokens on their way from memory.
template <typename R, int kGates, int kTokens>
struct Gates {
  time_scan::Fetched<R, kTokens> gate[kGates];

  __device__ __forceinline__ static time_scan::LineOf<ArrayFor<R>> line(const GateData& x, int g, const Sequences& s,
                                                                        const time_scan::Place& place) {
    return {{x.data, x.dtype}, place.b * x.b + g * x.g + place.channel, x.l, s, place.exists};
  }

  __device__ __forceinline__ void fetch(const GateData& x, const Sequences& s, const time_scan::Place& place,
                                        int64_t tau) {
#pragma unroll
    for (int g = 0; g < kGates; ++g) gate[g].fetch(line(x, g, s, place), tau);
  }

  // f(i, g, number) of all.
  template <typename F>
  __device__ __forceinline__ void decode(const GateData& x, const Sequences& s, const time_scan::Place& place,
                                         const F& f) const {
#pragma unroll
    for (int g = 0; g < kGates; ++g) gate[g].decode(line(x, g, s, place), [&](int i, R given) { f(i, g, given); });
  }
};

// Of rows whose sequence has no tokens `to` (S, N, D) becomes `from`, or where that is absent the empty state; of
// gradients zero.
void pass_states(const Inputs& in, const Array& from, const Array& to, bool gradients, Stream stream);

}  // namespace seqkern::elementwise_rnn::cuda

// The forward pass: outputs, last states, and checkpoints for the backward. Internal to cpu.cpp.
#pragma once
#include "common/parallel.h"
#include "selective_scan/cpu_call.h"

namespace seqkern::selective_scan {
namespace {

template <class F>
struct Forward : Call<F> {
  using A = typename F::A;
  using Call<F>::in;

  const FwdParams& p;
  const int64_t piece = channels_of_piece(in), vectors_of_piece = (piece + kLanes<A> - 1) / kLanes<A>;
  const int64_t groups_of_piece = (vectors_of_piece + kVectors - 1) / kVectors;
  static constexpr int kVectors = 4;  // of channels, which share the tiles of B and C

  explicit Forward(const FwdParams& params) : Call<F>(params), p(params) {}

  struct Arrays {
    Channels<F> channels[kVectors];
    A *B, *C;                // tiles of variable ones
    A *u, *delta, *x, *sum;  // (kChunk, kLanes)

    template <class Take>
    void allocate(const Forward& call, const Take& take) {
      for (Channels<F>& c : channels) c.allocate(call.in, take);
      B = take(call.coefficients), C = take(call.coefficients);
      u = take(kTile), delta = take(kTile), x = take(kTile), sum = take(kTile);
    }
    static constexpr int64_t kTile = kChunk * kLanes<A>;
  };
  using Workspace = InScratch<A, Arrays>;

  void run() const {
    if (in.channels == 0) return;
    const int64_t groups = in.channels / piece * groups_of_piece;
    const int64_t work = at_least(1, in.sequences.batch * this->L / at_least(1, in.num_runs)) * in.states;
    parallel_for(0, groups * in.num_runs, kGrain / (work * kVectors * kLanes<A>)+1, [&](int64_t begin, int64_t end) {
      Workspace workspace(*this);
      for (int64_t item = begin; item < end; ++item) scan(in.runs[item % in.num_runs], item / in.num_runs, workspace);
      finish_streams();
    });
  }

  // One run of one group of channels.
  void scan(const Run& run, int64_t group, Workspace& w) const {
    const int64_t end_of_piece = (group / groups_of_piece + 1) * piece;
    const int64_t first = group / groups_of_piece * piece + group % groups_of_piece * kVectors * kLanes<A>;
    int vectors = 0;
    for (int64_t d = first; d < end_of_piece && vectors < kVectors; d += kLanes<A>) {
      Channels<F>& channels = w.channels[vectors++];
      channels.load(in, d, end_of_piece);
      channels.load_states(in, in.initial_state, run.initial, channels.h);
    }
    this->for_each_chunk(run, false, [&](const Chunk& chunk) {
      if (!run.padding) {
        this->load_coefficients(in.B, chunk, first, w.B);
        this->load_coefficients(in.C, chunk, first, w.C);
      }
      for (int v = 0; v < vectors; ++v) scan_chunk(chunk, w.channels[v], w);
    });
    if (!p.last_state || run.final < 0) return;
    for (int v = 0; v < vectors; ++v)
      store_tile<A>(w.channels[v].h, w.channels[v].states(in, p.last_state, run.final), w.channels[v].lanes,
                    in.states * F::kParts);
  }

  void scan_chunk(const Chunk& chunk, const Channels<F>& channels, const Workspace& w) const {
    if (p.checkpoints && chunk.tau % kChunk == 0) {
      const int64_t rows = in.states * F::kParts;
      const int64_t offset = (chunk.run->b * num_chunks(in.sequences) + chunk.tau / kChunk) * rows * in.channels;
      store_tile<A>(channels.h, plane(p.checkpoints, in.accumulator, offset + channels.first, 1, in.channels),
                    channels.lanes, rows);
    }
    if (chunk.run->padding) return this->store_zeros(p.y, chunk, channels);
    this->load_delta(chunk, channels, w.u, w.delta, w.x, nullptr);
    Channels<F>::clear(w.sum, chunk.count * kLanes<A>);
    Ahead ahead;
    const Chunk next{chunk.run, chunk.tau + kChunk, kChunk, false};
    const Data* const arrays[] = {&in.u, &in.delta, &in.z};
    for (const Data* x : arrays)
      if (*x) ahead.add<A>(this->tokens(*x, next, channels.first));
    const Tile<F> tile{chunk.count,
                       in.two_exp,
                       this->coefficients_of(in.B, channels.B, w.B),
                       this->coefficients_of(in.C, channels.C, w.C),
                       w.delta,
                       w.x,
                       w.sum};
    for_each_state_block(in.states, [&]<int kStates>(int64_t n) {
      advance<F, kStates, false>(tile, n, channels.scaled_A, channels.h, nullptr, nullptr,
                                 ahead.share(n, kStates, in.states));
    });
    A* const z = w.x;
    if (in.z) load_tile<A>(this->tokens(in.z, chunk, channels.first), channels.lanes, chunk.count, z);
    for (int64_t i = 0; i < chunk.count * kLanes<A>; i += kLanes<A>) {
      Vec<A> y = this->output(channels, load<A>(w.sum + i), load<A>(w.u + i));  // [out]
      if (in.z) y *= silu(load<A>(z + i));
      store<A>(w.sum + i, y);
    }
    this->store_tokens(w.sum, p.y, chunk, channels);
  }
};

}  // namespace
}  // namespace seqkern::selective_scan

// The backward pass: dpre = dy silu'(pre) of a piece, recomputed, then dx from it; dweight and dbias as partial sums
// per chunk of time, reduced in order. Internal to cpu.cpp.
#pragma once
#include "causal_conv1d/cpu_piece.h"
#include "causal_conv1d/tile.h"
#include "common/parallel.h"

namespace seqkern::causal_conv1d {
namespace {

template <class T>
struct Backward {
  using A = Accumulator<T>;

  const BwdParams& p;
  const Geometry g;
  const Data<const T> x{static_cast<const T*>(p.x), p.x_stride};
  const Data<const T> dy{static_cast<const T*>(p.dy), p.dy_stride};
  const Data<T> dx{static_cast<T*>(p.dx), p.dx_stride};
  const Parameters<A> parameters{p, 1};
  const int64_t chunks = time_chunks(p);
  const int64_t tokens = at_most(kTimeChunk, at_least(g.lanes_are_time ? kTimeChunk : 16, 4 * g.S));  // of a piece
  const int64_t channels = g.lanes_are_time ? 1 : channels_of_block();
  A* const partials = static_cast<A*>(p.workspace);  // (B, chunks, W + 1, D)

  explicit Backward(const BwdParams& params) : p(params), g(params, !lanes_are_channels(params)) {}

  // Wide blocks read memory in long stretches; four or more of them keep threads busy.
  int64_t channels_of_block() const {
    const int64_t widest = clamp((1 << 13) / tokens, 16, 512);
    const int64_t blocks = round_up(ceil_div(p.channels, widest), ceil_div(4, at_least(1, p.sequences.batch * chunks)));
    return at_least(16, round_up(ceil_div(p.channels, at_least(1, blocks)), 16));
  }

  // What a piece of up to `tokens` tokens works in.
  struct Workspace {
    const int64_t x_size, dy_size, dx_size, sums_size;
    Scratch scratch;
    A* const x = scratch.take<A>(x_size);
    A* const dy = scratch.take<A>(dy_size);
    A* const dpre = scratch.take<A>(dy_size);
    A* const dx = scratch.take<A>(dx_size);
    T* const out = scratch.take<T>(dx_size);
    Vec<A>* const sums = scratch.take<Vec<A>>(sums_size);     // (channel vectors of the piece, W + 1)
    Vec<A>* const ignored = scratch.take<Vec<A>>(sums_size);  // as sums, of tokens that belong to a neighbour

    Workspace(const Geometry& g, int64_t width, int64_t tokens, int64_t channels)
        : x_size(g.window_size(tokens + 2 * g.S, channels)),
          dy_size(g.window_size(tokens + g.S, channels)),
          dx_size(g.window_size(tokens, channels)),
          sums_size((width + 1) * (g.lanes_are_time ? 1 : ceil_div(channels, kLanes<A>))),
          scratch(Scratch::bytes_of<A>(x_size) + 2 * Scratch::bytes_of<A>(dy_size) + Scratch::bytes_of<A>(dx_size) +
                  Scratch::bytes_of<T>(dx_size) + 2 * Scratch::bytes_of<Vec<A>>(sums_size)) {
      for (int64_t i = 0; i < sums_size; ++i) ignored[i] = Vec<A>{};
    }
  };

  void run() const {
    const int64_t blocks = ceil_div(p.channels, channels);
    parallel_for(0, p.sequences.batch * blocks * chunks, ceil_div(kGrain / 4, tokens * channels),
                 [&](int64_t begin, int64_t end) {
                   Workspace workspace(g, p.width, tokens, channels);
                   for (int64_t item = begin; item < end; ++item)
                     differentiate_chunk(item / chunks / blocks, item % chunks, item / chunks % blocks, workspace);
                 });
    reduce_partials();
    if (p.dinitial_state && p.state_size() > 0) differentiate_initial_states();
  }

  void differentiate_chunk(int64_t b, int64_t chunk, int64_t block, Workspace& workspace) const {
    for (int64_t i = 0; i < workspace.sums_size; ++i) workspace.sums[i] = Vec<A>{};
    const int64_t chunk_begin = chunk * kTimeChunk;
    const int64_t chunk_end = at_most(p.sequences.length, chunk_begin + kTimeChunk);
    for (int64_t t = chunk_begin; t < chunk_end; t += tokens)
      for_each_piece(p, b, t, at_most(tokens, chunk_end - t), block * channels, channels,
                     [&](const Piece& piece) { piece_gradient(piece, workspace); });

    const int64_t valid = at_most(channels, p.channels - block * channels);
    for (int64_t j = 0; j <= p.width; ++j) {
      A* const row = partials + ((b * chunks + chunk) * (p.width + 1) + j) * p.channels + block * channels;
      if (g.lanes_are_time)
        row[0] = sum_of_lanes<A>(workspace.sums[j]);
      else
        for (int64_t c = 0; c < valid; c += kLanes<A>)
          store<A>(row + c, workspace.sums[c / kLanes<A> * (p.width + 1) + j], static_cast<int>(valid - c));
    }
  }

  void piece_gradient(const Piece& piece, Workspace& workspace) const {
    if (piece.run->padding) return fill_zero(dx, piece);
    const Window<const A> dpre = activation_gradient(piece, workspace.sums, workspace);
    if (reaches_final_state(piece)) {
      const Window<A> sum{workspace.dx, g.step_of(piece), true};
      input_gradient(piece, dpre, sum);
      add_final_state_gradient(piece, sum);
      copy_out(dx, piece, sum);
    } else {
      const Window<T> target = output_window(g, dx, piece, workspace.out);
      input_gradient(piece, dpre, target);
      if (target.scratch) copy_out(dx, piece, target);
    }
  }

  // dpre_t = dy_t silu'(pre_t) of the piece's tokens and of the S that follow them in time, 0 outside the run.
  // [dw] Sums over the piece's own tokens of dpre_t x_{t - ...} and dpre_t are added to `sums`.
  Window<const A> activation_gradient(const Piece& piece, Vec<A>* sums, Workspace& workspace) const {
    const int64_t first = piece.begin - (g.sign > 0 ? 0 : g.S), last = piece.end() + (g.sign > 0 ? g.S : 0);
    const int64_t step = g.step_of(piece);
    const Window<A> dpre{workspace.dpre + (piece.begin - first) * step, step, true};
    // In the run only: pieces of states lie outside of it.
    const int64_t in_first = clamp(piece.run->begin, first, last), in_last = clamp(piece.run->end, in_first, last);
    const int64_t own_first = clamp(piece.begin, in_first, in_last), own_last = clamp(piece.end(), in_first, in_last);
    const auto section = [&](int64_t begin, int64_t end, Vec<A>* section_sums) {
      if (begin >= end) return;
      const Piece part{piece.run, begin, end - begin, piece.channel, piece.channels};
      differentiate_activation(part, {dpre.origin + (begin - piece.begin) * step, step, true}, section_sums, workspace);
    };
    // Ascending: what a vector writes beyond its tokens is overwritten.
    section(in_first, own_first, workspace.ignored);
    section(own_first, own_last, sums);
    section(own_last, in_last, workspace.ignored);
    const auto clear = [&](int64_t begin, int64_t end) {
      for (A* e = dpre.origin + (begin - piece.begin) * step; e < dpre.origin + (end - piece.begin) * step; ++e) *e = 0;
    };
    clear(first, in_first);
    clear(in_last, g.lanes_are_time ? last + kLanes<A> : last);  // a last vector is read whole
    return {dpre.origin, step, true};
  }

  // The same of a piece all inside its run.
  void differentiate_activation(const Piece& piece, const Window<A>& dpre, Vec<A>* sums, Workspace& workspace) const {
    const Run& run = *piece.run;
    const bool adjacent = g.lanes_are_time ? x.stride.l == 1 && dy.stride.l == 1 : x.stride.d == 1 && dy.stride.d == 1;
    Piece body = piece;  // whole vectors that read no state: straight from memory
    body.begin = clamp(run.begin + (g.sign > 0 ? g.S : 0), piece.begin, piece.end());
    body.tokens = at_least(0, at_most(piece.end(), run.end - (g.sign > 0 ? 0 : g.S)) - body.begin);
    if (g.lanes_are_time)
      body.tokens = body.tokens / kLanes<A> * kLanes<A>;
    else
      body.channels = body.channels / kLanes<A> * kLanes<A>;
    if (!adjacent || body.tokens == 0 || body.channels == 0)
      return differentiate_in_windows(piece, dpre, sums, workspace);

    const auto part = [&](int64_t begin, int64_t end, int64_t channel, int64_t end_channel) {
      if (begin >= end || channel >= end_channel) return;
      const Window<A> to{dpre.origin + (begin - piece.begin) * dpre.step + channel, dpre.step, true};
      differentiate_in_windows({&run, begin, end - begin, piece.channel + channel, end_channel - channel}, to,
                               sums + channel / kLanes<A> * (p.width + 1), workspace);
    };
    part(piece.begin, body.begin, 0, piece.channels);
    const Window<const T> from{x.at(run.b, body.channel, body.begin), x.stride.l, false};
    const Window<const T> gradient{dy.at(run.b, body.channel, body.begin), dy.stride.l, false};
    differentiate_piece(body, from, gradient, {dpre.origin + (body.begin - piece.begin) * dpre.step, dpre.step, true},
                        sums);
    part(body.begin, body.end(), body.channels, piece.channels);
    part(body.end(), piece.end(), 0, piece.channels);
  }

  void differentiate_in_windows(const Piece& piece, const Window<A>& dpre, Vec<A>* sums, Workspace& workspace) const {
    const int64_t first = piece.begin - (g.sign > 0 ? g.S : 0), last = piece.end() + (g.sign > 0 ? 0 : g.S);
    const Window<const A> from = fill<A>(g, p, x, piece, first, last, workspace.x);
    const Window<const A> gradient = fill<A>(g, p, dy, piece, piece.begin, piece.end(), workspace.dy);
    differentiate_piece(piece, from, gradient, dpre, sums);
  }

  template <class From>
  void differentiate_piece(const Piece& piece, const Window<From>& from, const Window<From>& gradient,
                           const Window<A>& dpre, Vec<A>* sums) const {
    visit_width_and_silu(p, [&]<int kWidth, bool kSilu>() {
      g.for_each_walk(piece, kLanes<A>, [&](const Walk& walk) {
        const Taps<A, kWidth> taps(parameters, piece.channel + walk.channel, g.lanes_are_time);
        differentiate<kWidth, kSilu, A>(from.walk(walk, -g.sign * g.S), g.sign * g.dilation * from.step, taps,
                                        gradient.walk(walk), dpre.walk(walk), walk.count, walk.lanes,
                                        g.lanes_are_time ? kPrefetchBytes : tokens * from.step * int64_t{sizeof(From)},
                                        sums + walk.channel / kLanes<A> * (p.width + 1));
      });
    });
  }

  // [dx] dx_t = sum_j weight_j dpre_{t + (W - 1 - j) dilation}
  template <class Out>
  void input_gradient(const Piece& piece, const Window<const A>& dpre, const Window<Out>& to) const {
    visit_width(p, [&]<int kWidth>() {
      g.for_each_walk(piece, kLanes<A>, [&](const Walk& walk) {
        Taps<A, kWidth> taps(parameters, piece.channel + walk.channel, g.lanes_are_time);
        taps.bias = Vec<A>{};
        convolve<kWidth, false, A, Out>(dpre.walk(walk, g.sign * g.S), -g.sign * g.dilation * dpre.step, taps,
                                        to.walk(walk), walk.count, walk.lanes,
                                        g.lanes_are_time ? kPrefetchBytes : tokens * to.step * int64_t{sizeof(Out)});
      });
    });
  }

  bool reaches_final_state(const Piece& piece) const {
    if (!p.dfinal_state || piece.run->final < 0) return false;
    return g.final_column(*piece.run, g.sign > 0 ? piece.end() - 1 : piece.begin) >= 0;
  }

  void add_final_state_gradient(const Piece& piece, const Window<A>& dx) const {
    const int64_t S = p.state_size();
    const A* const dfinal = static_cast<const A*>(p.dfinal_state.data);
    for (int64_t t = piece.begin; t < piece.end(); ++t) {
      const int64_t column = g.final_column(*piece.run, t);
      if (column < 0 || column >= S) continue;
      for (int64_t c = 0; c < piece.channels; ++c)
        dx.origin[(t - piece.begin) * dx.step + c] +=
            dfinal[(piece.run->final * p.channels + piece.channel + c) * S + column];
    }
  }

  // [state] The initial state is S more tokens before the run; their gradient is that of any token.
  void differentiate_initial_states() const {
    const int64_t S = p.state_size();
    const int64_t width = g.lanes_are_time ? 1 : kLanes<A>;
    const int64_t blocks = ceil_div(p.channels, width);
    parallel_for(0, p.num_runs * blocks, ceil_div(kGrain / 16, S * width), [&](int64_t begin, int64_t end) {
      Workspace workspace(g, p.width, S, width);
      for (int64_t item = begin; item < end; ++item) {
        const Run& run = p.runs[item / blocks];
        const int64_t d = item % blocks * width;
        if (run.initial < 0) continue;
        const Piece piece{&run, g.sign > 0 ? run.begin - S : run.end, S, d, at_most(width, p.channels - d)};
        const Window<const A> dpre = activation_gradient(piece, workspace.ignored, workspace);
        const Window<A> sum{workspace.dx, g.step_of(piece), true};
        input_gradient(piece, dpre, sum);
        if (reaches_final_state(piece)) add_final_state_gradient(piece, sum);
        visit_dtype(p.dinitial_state.dtype, [&]<class State>() {
          State* const out = static_cast<State*>(p.dinitial_state.data) + (run.initial * p.channels + d) * S;
          for (int64_t c = 0; c < piece.channels; ++c)
            for (int64_t s = 0; s < S; ++s)
              out[c * S + s] = narrow<State>(sum.origin[(g.sign > 0 ? s : S - 1 - s) * sum.step + c]);
        });
      }
    });
  }

  void reduce_partials() const {
    const int64_t rows = p.sequences.batch * chunks;
    for (int64_t j = 0; j <= p.width; ++j) {
      const Array& target = j < p.width ? p.dweight : p.dbias;
      if (!target) continue;
      visit_dtype(target.dtype, [&]<class Parameter>() {
        Parameter* const out = static_cast<Parameter*>(target.data) + (j < p.width ? j : 0);
        for (int64_t d = 0; d < p.channels; ++d) {
          A sum = 0;
          for (int64_t row = 0; row < rows; ++row) sum += partials[(row * (p.width + 1) + j) * p.channels + d];
          out[d * (j < p.width ? p.width : 1)] = narrow<Parameter>(sum);
        }
      });
    }
  }
};

void bwd(const BwdParams& p) {
  visit_dtype(p.dtype, [&]<class T>() { Backward<T>(p).run(); });
}

}  // namespace
}  // namespace seqkern::causal_conv1d

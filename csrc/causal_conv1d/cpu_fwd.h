// The forward pass: outputs and final states. Internal to cpu.cpp.
#pragma once
#include "causal_conv1d/cpu_direct.h"
#include "causal_conv1d/cpu_piece.h"
#include "causal_conv1d/tile.h"
#include "common/parallel.h"

namespace seqkern::causal_conv1d {
namespace {

template <class T>
struct Forward {
  using A = Accumulator<T>;

  const FwdParams& p;
  const Geometry g;
  const Data<const T> x{static_cast<const T*>(p.x), p.x_stride};
  const Data<T> y{static_cast<T*>(p.y), p.y_stride};
  const Parameters<A> parameters{p, p.silu ? kParameterScale<T, true> : kParameterScale<T, false>};
  const PairedParameters<T> paired{parameters};
  static constexpr int64_t kChannels = 512;
  const int64_t tokens = g.lanes_are_time ? 4096 : 64;  // of a piece
  const int64_t channels = g.lanes_are_time ? 1 : kChannels;

  explicit Forward(const FwdParams& params) : p(params), g(params, !lanes_are_channels(params)) {}

  // What a piece that is not read straight from memory works in.
  struct Workspace {
    const int64_t tokens, channels, x_size, y_size;
    Scratch scratch;
    A* const x = scratch.take<A>(x_size);
    T* const y = scratch.take<T>(y_size);

    explicit Workspace(const Geometry& g)
        : tokens(at_least(g.lanes_are_time ? 1024 : 32, g.S)),
          channels(g.channels_of_piece(tokens)),
          x_size(g.window_size(tokens + g.S, channels)),
          y_size(g.window_size(tokens, channels)),
          scratch(Scratch::bytes_of<A>(x_size) + Scratch::bytes_of<T>(y_size)) {}
  };

  void run() const {
    if (p.final_state) write_final_state();
    const int64_t tiles = ceil_div(p.sequences.length, tokens), blocks = ceil_div(p.channels, channels);
    const int64_t item_size = at_most(tokens, p.sequences.length) * at_most(channels, p.channels);
    parallel_for(0, p.sequences.batch * tiles * blocks, ceil_div(kGrain, at_least(1, item_size)),
                 [&](int64_t begin, int64_t end) {
                   Workspace workspace(g);
                   for (int64_t item = begin; item < end; ++item) {
                     // Neighbours in memory follow each other: time fastest where time is contiguous.
                     const int64_t b = item / (tiles * blocks), rest = item % (tiles * blocks);
                     const int64_t tile = g.lanes_are_time ? rest % tiles : rest / blocks;
                     const int64_t block = g.lanes_are_time ? rest / tiles : rest % blocks;
                     for_each_piece(p, b, tile * tokens, tokens, block * channels, channels,
                                    [&](const Piece& piece) { convolve_piece(piece, workspace); });
                   }
                 });
  }

  void convolve_piece(const Piece& piece, Workspace& workspace) const {
    if (piece.run->padding) return fill_zero(y, piece);
    if constexpr (kHasDirectForm<T>) {
      const bool adjacent = g.lanes_are_time ? x.stride.l == 1 && y.stride.l == 1 : x.stride.d == 1 && y.stride.d == 1;
      if (adjacent && g.dilation == 1 && p.width >= 2 && p.width <= 4) {
        visit_width_and_silu(p, [&]<int kWidth, bool kSilu>() {
          if constexpr (kWidth > 0) {
            if (g.sign > 0)
              direct<kWidth, kSilu, false>(piece, workspace);
            else
              direct<kWidth, kSilu, true>(piece, workspace);
          }
        });
        return;
      }
    }
    convolve_in_windows(piece, workspace);
  }

  template <int kWidth, bool kSilu, bool kReverse>
  void direct(const Piece& piece, Workspace& workspace) const {
    if (g.lanes_are_time)
      convolve_along_time<kWidth, kSilu, kReverse>(piece, workspace);
    else
      convolve_across_channels<kWidth, kSilu, kReverse>(piece, workspace);
  }

  template <int kWidth, bool kSilu, bool kReverse>
  void convolve_along_time(const Piece& piece, Workspace& workspace) const {
    const Run& run = *piece.run;
    const Taps<A, kWidth> taps(parameters, piece.channel, true);
    const T* const from = x.at(run.b, piece.channel, 0);
    T* const to = y.at(run.b, piece.channel, 0);
    const int64_t first = run.begin + (kReverse ? 0 : kWidth), last = run.end - (kReverse ? kWidth : 0);
    for (int64_t t = piece.begin; t < piece.end();) {
      const int64_t pairs = t < first ? 0 : (at_most(piece.end(), last) - t) / kPair;
      if (pairs > 0) {
        convolve_time<kWidth, kSilu, kReverse>(from + t, taps, to + t, pairs);
        t += pairs * kPair;
        continue;
      }
      const Piece edge{&run, t, at_most(kPair, piece.end() - t), piece.channel, 1};
      if (reads_initial_state(edge)) {
        convolve_in_windows(edge, workspace);
      } else {  // one pair, zeros around it
        T inputs[kPair + 2 * kWidth] = {}, outputs[kPair];
        const int64_t begin = at_least(run.begin, kReverse ? t : t - kWidth);
        const int64_t end = at_most(run.end, kReverse ? t + kPair + kWidth : t + kPair);
        copy_some<kPair>(from + begin, end - begin, inputs + kWidth + (begin - t));
        convolve_time<kWidth, kSilu, kReverse>(inputs + kWidth, taps, outputs, 1);
        copy_some<kPair>(outputs, edge.tokens, to + t);
      }
      t += edge.tokens;
    }
  }

  template <int kWidth, bool kSilu, bool kReverse>
  void convolve_across_channels(const Piece& piece, Workspace& workspace) const {
    const Run& run = *piece.run;
    const int64_t pairs = piece.channels / kPair, whole = pairs * kPair;
    const T zeros[kChannels] = {};
    T ignored[kChannels];
    for (int64_t t = piece.begin; t < piece.end(); t += kTokens) {
      const Piece part{&run, t, at_most(kTokens, piece.end() - t), piece.channel, piece.channels};
      if (reads_initial_state(part)) {
        convolve_in_windows(part, workspace);
        continue;
      }
      const T* from[kTokens + kWidth - 1];
      T* to[kTokens];
      for (int i = 0; i < kTokens + kWidth - 1; ++i) {
        const int64_t token = t + i - (kReverse ? 0 : kWidth - 1);
        from[i] = token >= run.begin && token < run.end ? x.at(run.b, piece.channel, token) : zeros;
      }
      for (int i = 0; i < kTokens; ++i) to[i] = i < part.tokens ? y.at(run.b, piece.channel, t + i) : ignored;
      convolve_channels<kWidth, kSilu, kReverse>(from, paired.rows + piece.channel, parameters.row(), to,
                                                 kTokens * x.stride.l * size_of(p.dtype), pairs);
    }
    if (whole < piece.channels)
      convolve_in_windows({&run, piece.begin, piece.tokens, piece.channel + whole, piece.channels - whole}, workspace);
  }

  // Whether a token of the piece reads a column of the initial state.
  bool reads_initial_state(const Piece& piece) const {
    const Run& run = *piece.run;
    if (!p.initial_state || run.initial < 0) return false;
    return g.sign > 0 ? piece.begin < run.begin + g.S : piece.end() > run.end - g.S;
  }

  // Any width, dilation, strides and data type.
  void convolve_in_windows(const Piece& whole, Workspace& workspace) const {
    for_each_part(whole, workspace.tokens, workspace.channels, [&](const Piece& piece) {
      const int64_t first = piece.begin - (g.sign > 0 ? g.S : 0), last = piece.end() + (g.sign > 0 ? 0 : g.S);
      const Window<const A> from = fill<A>(g, p, x, piece, first, last, workspace.x);
      const Window<T> to = output_window(g, y, piece, workspace.y);
      visit_width_and_silu(p, [&]<int kWidth, bool kSilu>() {
        g.for_each_walk(piece, kLanes<A>, [&](const Walk& walk) {
          const Taps<A, kWidth> taps(parameters, piece.channel + walk.channel, g.lanes_are_time);
          convolve<kWidth, kSilu, A, T>(from.walk(walk, -g.sign * g.S), g.sign * g.dilation * from.step, taps,
                                        to.walk(walk), walk.count, walk.lanes, 0);
        });
      });
      if (to.scratch) copy_out(y, piece, to);
    });
  }

  // [state] The last S tokens of each run, and what came before where the run is shorter.
  void write_final_state() const {
    const int64_t S = p.state_size();
    A* const out = static_cast<A*>(p.final_state.data);
    parallel_for(0, p.num_runs * p.channels, ceil_div(kGrain, S + 1), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const Run& run = p.runs[item / p.channels];
        const int64_t d = item % p.channels;
        if (run.final < 0) continue;
        for (int64_t c = 0; c < S; ++c) {
          const int64_t t = g.sign > 0 ? run.end - S + c : run.begin + S - 1 - c;
          const bool in_run = t >= run.begin && t < run.end;
          out[(run.final * p.channels + d) * S + c] = in_run ? static_cast<A>(widen(*x.at(run.b, d, t)))
                                                             : initial_value<A>(p, run, d, g.initial_column(run, t));
        }
      }
    });
  }
};

void fwd(const FwdParams& p) {
  visit_dtype(p.dtype, [&]<class T>() { Forward<T>(p).run(); });
}

}  // namespace
}  // namespace seqkern::causal_conv1d

// causal_conv1d on the CPU, compiled once per instruction set. Torch-free.
//
// A vector's lanes are consecutive tokens of one channel where time is contiguous in memory, else consecutive channels
// of one token. Either way the work is cut into pieces (tokens of one run x channels); what a piece reads lies in
// windows of accumulators, where a step in time and a step in lanes are fixed distances, so one loop serves both
// orders, both directions and every data type. Every output is the same sum in the same order wherever pieces end.
#include "causal_conv1d/cpu_direct.h"
#include "causal_conv1d/cpu_piece.h"
#include "causal_conv1d/cpu_step.h"
#include "causal_conv1d/tile.h"
#include "common/parallel.h"

namespace seqkern::causal_conv1d {
namespace {

// Threads are worth waking for this many elements.
constexpr int64_t kGrain = 1 << 16;

template <class T>
struct Forward {
  using A = Accumulator<T>;

  const FwdParams& p;
  const Geometry g;
  const Data<const T> x{static_cast<const T*>(p.x), p.x_stride};
  const Data<T> y{static_cast<T*>(p.y), p.y_stride};
  const Parameters<A> parameters{p, p.silu ? kParameterScale<T, true> : kParameterScale<T, false>};
  const PairedParameters<T> paired{parameters};
  const int64_t tokens = g.lanes_are_time ? 4096 : 64;  // of a piece
  const int64_t channels = g.lanes_are_time ? 1 : 512;

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
    const T zeros[512] = {};
    T ignored[512];
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
    const T* const x = static_cast<const T*>(p.x);
    A* const out = static_cast<A*>(p.final_state.data);
    for (int64_t i = 0; i < p.num_runs; ++i) {
      const Run& run = p.runs[i];
      if (run.final < 0) continue;
      parallel_for(0, p.channels, ceil_div(kGrain, S + 1), [&](int64_t begin, int64_t end) {
        for (int64_t d = begin; d < end; ++d)
          for (int64_t c = 0; c < S; ++c) {
            const int64_t t = g.sign > 0 ? run.end - S + c : run.begin + S - 1 - c;
            A& value = out[(run.final * p.channels + d) * S + c];
            if (t >= run.begin && t < run.end)
              value = static_cast<A>(widen(x[run.b * p.x_stride.b + d * p.x_stride.d + t * p.x_stride.l]));
            else
              value = initial_value<A>(p, run, d, g.sign > 0 ? t - run.begin + S : run.end + S - 1 - t);
          }
      });
    }
  }
};

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
    const Window<const A> dpre = activation_gradient(piece, workspace);
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
  // Sums over the piece's own tokens of dpre_t x_{t - ...} and dpre_t go to workspace.sums.
  Window<const A> activation_gradient(const Piece& piece, Workspace& workspace) const {
    const int64_t first = piece.begin - (g.sign > 0 ? 0 : g.S), last = piece.end() + (g.sign > 0 ? g.S : 0);
    const int64_t step = g.step_of(piece);
    const Window<A> dpre{workspace.dpre + (piece.begin - first) * step, step, true};
    // In the run only: pieces of states lie outside of it.
    const int64_t in_first = clamp(piece.run->begin, first, last), in_last = clamp(piece.run->end, in_first, last);
    const int64_t own_first = clamp(piece.begin, in_first, in_last), own_last = clamp(piece.end(), in_first, in_last);
    const auto section = [&](int64_t begin, int64_t end, Vec<A>* sums) {
      if (begin >= end) return;
      const Piece part{piece.run, begin, end - begin, piece.channel, piece.channels};
      differentiate_activation(part, {dpre.origin + (begin - piece.begin) * step, step, true}, sums, workspace);
    };
    // Ascending: what a vector writes beyond its tokens is overwritten.
    section(in_first, own_first, workspace.ignored);
    section(own_first, own_last, workspace.sums);
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
    if (!adjacent || body.tokens == 0 || body.channels == 0) return differentiate_in_windows(piece, dpre, sums, workspace);

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

  // dx_t = sum_j weight_j dpre_{t + (W - 1 - j) dilation}
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

  // Token t of a run is column t - first of its final state, counted in time.
  int64_t final_column(const Run& run, int64_t t) const {
    return g.sign > 0 ? t - run.end + p.state_size() : run.begin + p.state_size() - 1 - t;
  }

  bool reaches_final_state(const Piece& piece) const {
    if (!p.dfinal_state || piece.run->final < 0) return false;
    return final_column(*piece.run, g.sign > 0 ? piece.end() - 1 : piece.begin) >= 0;
  }

  void add_final_state_gradient(const Piece& piece, const Window<A>& dx) const {
    const int64_t S = p.state_size();
    const A* const dfinal = static_cast<const A*>(p.dfinal_state.data);
    for (int64_t t = piece.begin; t < piece.end(); ++t) {
      const int64_t column = final_column(*piece.run, t);
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
    for (int64_t i = 0; i < p.num_runs; ++i) {
      const Run& run = p.runs[i];
      if (run.initial < 0 || !p.initial_state) continue;
      parallel_for(0, ceil_div(p.channels, width), ceil_div(kGrain / 16, S * width), [&](int64_t begin, int64_t end) {
        Workspace workspace(g, p.width, S, width);
        for (int64_t block = begin; block < end; ++block) {
          const int64_t d = block * width;
          const Piece piece{&run, g.sign > 0 ? run.begin - S : run.end, S, d, at_most(width, p.channels - d)};
          const Window<const A> dpre = activation_gradient(piece, workspace);
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

void fwd(const FwdParams& p) {
  visit_dtype(p.dtype, [&]<class T>() { Forward<T>(p).run(); });
}

void bwd(const BwdParams& p) {
  visit_dtype(p.dtype, [&]<class T>() { Backward<T>(p).run(); });
}

}  // namespace

namespace SEQKERN_ISA {
const CpuKernels kernels = {fwd, bwd, step};
}

}  // namespace seqkern::causal_conv1d

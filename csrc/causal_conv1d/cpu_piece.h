// Pieces of a causal convolution (tokens of one run x channels), the windows of accumulators they are computed in, and
// the two loops that compute: a convolution, and the derivative of its activation. Internal to cpu.cpp.
#pragma once
#include "causal_conv1d/cpu_parameters.h"

namespace seqkern::causal_conv1d {
namespace {

// (B, D, L)
template <class T>
struct Data {
  T* data;
  Strides stride;

  T* at(int64_t b, int64_t d, int64_t t) const { return data + b * stride.b + d * stride.d + t * stride.l; }
};

// Tokens [begin, end()) of one run, channels [channel, channel + channels).
struct Piece {
  const Run* run;
  int64_t begin, tokens;
  int64_t channel, channels;

  int64_t end() const { return begin + tokens; }
};

// `count` vectors of a piece, each `advance` tokens after the one before, of which `lanes` lanes are the piece's.
struct Walk {
  int64_t token, channel;  // of the first lane, relative to the piece
  int64_t count, advance;
  int lanes;
};

// Vector i is at p + i step.
template <class T>
struct Stride {
  T* p;
  int64_t step;

  T* operator[](int64_t i) const { return p + i * step; }
};

// Elements of a piece and its surroundings: token t, channel c at origin[(t - piece.begin) * step + c].
template <class T>
struct Window {
  T* origin;
  int64_t step;
  bool scratch;  // not the tensor itself

  // The vectors of a walk, or those `tokens` tokens later.
  Stride<T> walk(const Walk& w, int64_t tokens = 0) const {
    return {origin + (w.token + tokens) * step + w.channel, w.advance * step};
  }
};

// Threads are worth waking for this many elements.
constexpr int64_t kGrain = 1 << 16;

// How far ahead of a loop along contiguous memory its next lines are fetched.
constexpr int64_t kPrefetchBytes = 2048;

// Calls body(piece) for the part of every run in tokens [begin, begin + tokens) of batch row b. Runs are sorted.
template <class Body>
inline void for_each_piece(const Inputs& p, int64_t b, int64_t begin, int64_t tokens, int64_t channel, int64_t channels,
                           const Body& body) {
  const int64_t end = at_most(begin + tokens, p.sequences.length);
  int64_t low = 0, high = p.num_runs;  // the first run that ends after `begin`
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    const Run& run = p.runs[middle];
    if (run.b < b || (run.b == b && run.end <= begin))
      low = middle + 1;
    else
      high = middle;
  }
  for (; low < p.num_runs && p.runs[low].b == b && p.runs[low].begin < end; ++low) {
    const Run& run = p.runs[low];
    const int64_t first = at_least(begin, run.begin), last = at_most(end, run.end);
    if (first < last) body(Piece{&run, first, last - first, channel, at_most(channels, p.channels - channel)});
  }
}

// Calls body(part) for parts of at most `tokens` tokens and `channels` channels.
template <class Body>
inline void for_each_part(const Piece& piece, int64_t tokens, int64_t channels, const Body& body) {
  for (int64_t c = 0; c < piece.channels; c += channels)
    for (int64_t t = 0; t < piece.tokens; t += tokens)
      body(Piece{piece.run, piece.begin + t, at_most(tokens, piece.tokens - t), piece.channel + c,
                 at_most(channels, piece.channels - c)});
}

// Lanes are channels where these are contiguous, and where there are too few tokens to fill a vector.
inline bool lanes_are_channels(const Inputs& p) {
  return p.x_stride.l != 1 || (p.sequences.length < 8 && p.channels > p.sequences.length);
}

// How pieces of this call lie in windows.
struct Geometry {
  bool lanes_are_time;
  int sign;            // of the step in time, -1 for reverse
  int64_t dilation;    // taps beyond all tokens read nothing: they need no more than this
  int64_t S;           // tokens that a token reads before itself
  int64_t state_size;  // columns of the states, S unless there is no initial state

  Geometry(const Inputs& p, bool lanes_are_time)
      : lanes_are_time(lanes_are_time),
        sign(p.sequences.reverse ? -1 : 1),
        dilation(p.initial_state ? p.dilation : at_most(p.dilation, at_least(1, p.sequences.length))),
        S((p.width - 1) * dilation),
        state_size(p.state_size()) {}

  int64_t channels_of_piece(int64_t tokens) const {
    return lanes_are_time ? 1 : clamp((1 << 12) / tokens / 16 * 16, 16, 128);
  }
  int64_t step_of(const Piece& piece) const { return lanes_are_time ? 1 : round_up(piece.channels, 16); }
  int64_t window_size(int64_t tokens, int64_t channels) const {
    return lanes_are_time ? tokens + 32 : tokens * round_up(channels, 16);
  }

  // Columns of the states, S of the call: token t before the run (in time) is a column of the initial state, one of its
  // last tokens a column of the final state.
  int64_t initial_column(const Run& run, int64_t t) const {
    return sign > 0 ? t - run.begin + state_size : run.end + state_size - 1 - t;
  }
  int64_t final_column(const Run& run, int64_t t) const {
    return sign > 0 ? t - run.end + state_size : run.begin + state_size - 1 - t;
  }

  template <class Body>
  void for_each_walk(const Piece& piece, int lanes, const Body& body) const {
    if (lanes_are_time) {
      const int64_t whole = piece.tokens / lanes;
      if (whole > 0) body(Walk{0, 0, whole, lanes, lanes});
      if (piece.tokens % lanes) body(Walk{whole * lanes, 0, 1, lanes, static_cast<int>(piece.tokens % lanes)});
    } else {
      for (int64_t c = 0; c < piece.channels; c += lanes)
        body(Walk{0, c, piece.tokens, 1, static_cast<int>(at_most(lanes, piece.channels - c))});
    }
  }
};

// Column `column` of the initial state of channel d, or 0.
template <class A>
inline A initial_value(const Inputs& p, const Run& run, int64_t d, int64_t column) {
  if (run.initial < 0 || !p.initial_state) return 0;
  A value = 0;
  visit_dtype(p.initial_state.dtype, [&]<class State>() {
    const State* const state = static_cast<const State*>(p.initial_state.data);
    value = without_payload(static_cast<A>(widen(state[(run.initial * p.channels + d) * p.state_size() + column])));
  });
  return value;
}

// Tokens [first, last) of x as accumulators in scratch; outside the run stands the initial state.
template <class A, class T>
inline Window<const A> fill(const Geometry& g, const Inputs& p, const Data<const T>& x, const Piece& piece,
                            int64_t first, int64_t last, A* scratch) {
  const Run& run = *piece.run;
  const int64_t step = g.step_of(piece);
  const int64_t in_first = clamp(run.begin, first, last), in_last = clamp(run.end, in_first, last);
  const auto fill_state = [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t)
      for (int64_t c = 0; c < piece.channels; ++c)
        scratch[(t - first) * step + c] = initial_value<A>(p, run, piece.channel + c, g.initial_column(run, t));
  };
  fill_state(first, in_first);
  if (g.lanes_are_time)
    convert(x.at(run.b, piece.channel, in_first), x.stride.l, in_last - in_first, scratch + (in_first - first));
  else
    for (int64_t t = in_first; t < in_last; ++t)
      convert(x.at(run.b, piece.channel, t), x.stride.d, piece.channels, scratch + (t - first) * step);
  fill_state(in_last, last);
  return {scratch + (piece.begin - first) * step, step, true};
}

// Where a piece's outputs are written: in the tensor itself, or in scratch for copy_out.
template <class T>
inline Window<T> output_window(const Geometry& g, const Data<T>& y, const Piece& piece, T* scratch) {
  if ((g.lanes_are_time ? y.stride.l : y.stride.d) == 1)
    return {y.at(piece.run->b, piece.channel, piece.begin), y.stride.l, false};
  return {scratch, g.step_of(piece), true};
}

template <class T, class From>
inline void copy_out(const Data<T>& y, const Piece& piece, const Window<From>& from) {
  for (int64_t t = 0; t < piece.tokens; ++t)
    for (int64_t c = 0; c < piece.channels; ++c)
      *y.at(piece.run->b, piece.channel + c, piece.begin + t) = narrow<T>(widen(from.origin[t * from.step + c]));
}

template <class T>
inline void fill_zero(const Data<T>& y, const Piece& piece) {
  for (int64_t c = 0; c < piece.channels; ++c)
    for (int64_t t = 0; t < piece.tokens; ++t) *y.at(piece.run->b, piece.channel + c, piece.begin + t) = T{};
}

// sum_j weight_j x_j + bias, always in this order.
template <class A, int kWidth, class T>
inline Vec<A> weighted_sum(const T* x, int64_t tap, const Taps<A, kWidth>& taps) {
  Vec<A> sum = taps.bias;
  for (int j = 0; j < taps.width(); ++j) sum = madd(taps.weight[j], load<A>(x + j * tap), sum);
  return sum;
}

// [conv] y_i = [silu] sum_j weight_j x_{i, j} + bias for `count` vectors i; x_{i, j} lies at x[i] + j tap.
template <int kWidth, bool kSilu, class A, class T>
void convolve(Stride<const A> x, int64_t tap, const Taps<A, kWidth>& given, Stride<T> y, int64_t count, int lanes,
              int64_t prefetch_bytes) {
  const Taps<A, kWidth> taps = given;
  for (int64_t i = 0; i < count; ++i) {
    prefetch_write(y[i], prefetch_bytes);
    store_activated<kSilu, T, A>(y[i], weighted_sum(x[i], tap, taps), lanes);
  }
}

// dpre_i = dy_i [silu'(pre_i)]; adds dpre_i x_{i, j} to sums[j] and dpre_i to sums[W].
template <int kWidth, bool kSilu, class A, class T>
void differentiate(Stride<const T> x, int64_t tap, const Taps<A, kWidth>& given, Stride<const T> dy, Stride<A> dpre,
                   int64_t count, int lanes, int64_t prefetch_bytes, Vec<A>* sums) {
  const Taps<A, kWidth> taps = given;
  const int width = taps.width();
  Taps<A, kWidth> sum = taps;  // of W products, and in `bias` of dpre
  for (int j = 0; j < width; ++j) sum.weight[j] = Vec<A>{};
  sum.bias = Vec<A>{};
  const auto valid = first_lanes<A>(lanes);
  const auto each = [&]<bool kWhole>() {
    for (int64_t i = 0; i < count; ++i) {
      prefetch_read(x[i], prefetch_bytes);
      prefetch_read(dy[i], prefetch_bytes);
      const auto tap_of = [&](int j) { return load<A>(x[i] + j * tap); };
      Vec<A> loaded[kWidth == 0 ? 1 : kWidth];  // before the store, which might be to the same memory for all C++ knows
      for (int j = 0; j < kWidth; ++j) loaded[j] = tap_of(j);
      const auto x_of = [&](int j) { return kWidth == 0 ? tap_of(j) : loaded[j]; };
      Vec<A> gradient = load<A>(dy[i]);
      if constexpr (kSilu) {
        Vec<A> pre = taps.bias;
        for (int j = 0; j < width; ++j) pre = madd(taps.weight[j], x_of(j), pre);
        gradient *= silu_derivative(pre);
      }
      store<A>(dpre[i], gradient);
      // Lanes that are not the piece's are left out, not multiplied by 0: they may hold NaN.
      for (int j = 0; j < width; ++j) {
        const Vec<A> next = madd(gradient, x_of(j), sum.weight[j]);
        sum.weight[j] = kWhole ? next : select(valid, next, sum.weight[j]);
      }
      const Vec<A> next = sum.bias + gradient;
      sum.bias = kWhole ? next : select(valid, next, sum.bias);
    }
  };
  if (lanes == kLanes<A>)
    each.template operator()<true>();
  else
    each.template operator()<false>();
  for (int j = 0; j < width; ++j) sums[j] += sum.weight[j];
  sums[width] += sum.bias;
}

}  // namespace
}  // namespace seqkern::causal_conv1d

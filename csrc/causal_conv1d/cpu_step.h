// One or several new tokens per batch row against a state that is updated in place. Internal to cpu.cpp.
#pragma once
#include "causal_conv1d/cpu_piece.h"
#include "common/parallel.h"
#include "common/state_row.h"

namespace seqkern::causal_conv1d {
namespace {

template <class T, class State>
struct Step {
  using A = Accumulator<T>;
  static constexpr int64_t kStep = kLanes<A>;

  const StepParams& p;
  const Parameters<A>& parameters;
  const int64_t S = (p.width - 1) * p.dilation;
  const Data<const T> x{static_cast<const T*>(p.x), p.x_stride};
  const Data<T> y{static_cast<T*>(p.y), p.y_stride};
  const Data<State> state{static_cast<State*>(p.conv_state.data), p.conv_state_stride};

  // Channels [d, d + lanes) of all batch rows; window: (S + T) vectors.
  void advance(int64_t d, int lanes, A* window) const {
    const Taps<A, 0> taps(parameters, d, false);
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t row = state_row(p, b);
      if (row < 0) {
        skip(b, d, lanes);
        continue;
      }
      for (int64_t s = 0; s < S; ++s)
        convert(state.at(row, d, p.state_size - S + s), state.stride.d, lanes, window + s * kStep);
      for (int64_t t = 0; t < p.tokens; ++t) {
        convert(x.at(b, d, t), x.stride.d, lanes, window + (S + t) * kStep);
        const Vec<A> sum = weighted_sum(window + t * kStep, p.dilation * kStep, taps);
        T out[kStep];
        if (p.silu)
          store_activated<true, T, A>(out, sum, lanes);
        else
          store_activated<false, T, A>(out, sum, lanes);
        for (int c = 0; c < lanes; ++c) *y.at(b, d + c, t) = out[c];
      }
      for (int64_t column = 0; column < p.state_size; ++column) {
        const int64_t token = column + p.tokens - p.state_size;
        for (int64_t c = 0; c < lanes; ++c)
          *state.at(row, d + c, column) =
              token < 0 ? *state.at(row, d + c, column + p.tokens) : narrow<State>(widen(*x.at(b, d + c, token)));
      }
    }
  }

  // The same for one token of channels [begin, end), whole vectors of neighbours. The kColumns columns of a channel
  // follow one another in memory, or lie in rows of neighbouring channels.
  template <int kColumns, int kWidth, bool kSilu>
  void advance_one_token(int64_t begin, int64_t end) const {
    const bool split = state.stride.d != 1;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t row = state_row(p, b);
      if (row < 0) {
        skip(b, begin, end - begin);
        continue;
      }
      const int64_t step = split ? kStep : state.stride.l;
      for (int64_t d = begin; d < end; d += kStep) {
        const Taps<A, kWidth> taps(parameters, d, false);
        State* const memory = state.at(row, d, 0);
        Vec<A> rows[kColumns], columns[kColumns + 1];
        for (int c = 0; c < kColumns; ++c) rows[c] = load<A>(memory + c * step);
        if (split)
          split_columns<kColumns, A>(rows, columns);
        else
          for (int c = 0; c < kColumns; ++c) columns[c] = rows[c];
        columns[kColumns] = load<A>(x.at(b, d, 0));

        Vec<A> sum = taps.bias;
        for (int j = 0; j < kWidth; ++j) sum = madd(taps.weight[j], columns[kColumns + 1 - kWidth + j], sum);
        store_activated<kSilu, T, A>(y.at(b, d, 0), sum, kLanes<A>);

        if (split)
          append_column<kColumns, A>(memory, columns[kColumns], rows);
        else
          for (int c = 0; c < kColumns; ++c) rows[c] = columns[c + 1];
        for (int c = 0; c < kColumns; ++c) store<A>(memory + c * step, rows[c]);
      }
    }
  }

  void skip(int64_t b, int64_t d, int64_t lanes) const {
    for (int64_t t = 0; t < p.tokens; ++t)
      for (int64_t c = 0; c < lanes; ++c) *y.at(b, d + c, t) = T{};
  }

  void run() const {
    const int64_t vectors = round_up(p.channels, kStep) / kStep;
    const int64_t work = at_least(1, p.batch * p.tokens * (p.width + 8) * kStep);  // of a vector of channels
    parallel_for(0, vectors, round_up(1 << 19, work) / work, [&](int64_t begin, int64_t end) {
      const int64_t whole = at_most(end * kStep, p.channels / kStep * kStep);
      int64_t d = begin * kStep;
      if (d < whole && advance_one_token(d, whole)) d = whole;
      if (d >= at_most(end * kStep, p.channels)) return;
      Scratch scratch(Scratch::bytes_of<A>((S + p.tokens) * kStep));
      A* const window = scratch.take<A>((S + p.tokens) * kStep);
      for (; d < end * kStep && d < p.channels; d += kStep)
        advance(d, static_cast<int>(at_most(kStep, p.channels - d)), window);
    });
  }

  // False if this call has no such form.
  bool advance_one_token(int64_t begin, int64_t end) const {
    const bool adjacent = x.stride.d == 1 && y.stride.d == 1 &&
                          (state.stride.d == 1 || (state.stride.l == 1 && state.stride.d == p.state_size));
    const int64_t unused = p.state_size - S;
    if (p.tokens != 1 || p.dilation != 1 || !adjacent || unused > 1) return false;
    bool done = false;
    if constexpr (kSame<State, T> || kSame<State, A>)
      visit_width_and_silu(p, [&]<int kWidth, bool kSilu>() {
        if constexpr (kWidth > 0) {
          if (unused == 0)
            advance_one_token<kWidth - 1, kWidth, kSilu>(begin, end);
          else
            advance_one_token<kWidth, kWidth, kSilu>(begin, end);
          done = true;
        }
      });
    return done;
  }
};

void step(const StepParams& p) {
  visit_dtype(p.dtype, [&]<class T>() {
    const Parameters<Accumulator<T>> parameters(p, p.silu ? kParameterScale<T, true> : kParameterScale<T, false>);
    visit_dtype(p.conv_state.dtype, [&]<class State>() { Step<T, State>{p, parameters}.run(); });
  });
}

}  // namespace
}  // namespace seqkern::causal_conv1d

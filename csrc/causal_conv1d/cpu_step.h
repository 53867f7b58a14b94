// One or several new tokens per batch row against a state that is updated in place. Internal to cpu.cpp.
#pragma once
#include "causal_conv1d/cpu_piece.h"
#include "common/parallel.h"

namespace seqkern::causal_conv1d {
namespace {

// Row of conv_state of batch row b, -1: none.
inline int64_t state_row(const StepParams& p, int64_t b) {
  if (p.state_indices == nullptr) return b;
  const int64_t row = p.state_indices_is_int64 ? static_cast<const int64_t*>(p.state_indices)[b]
                                               : static_cast<const int32_t*>(p.state_indices)[b];
  return row < p.rows ? row : -1;
}

// Channels [d, d + lanes) of all batch rows; window: (S + T) vectors.
template <class T, class State, int kWidth>
void step_channels(const StepParams& p, const Parameters<Accumulator<T>>& parameters, int64_t d, int lanes,
                   Accumulator<T>* window) {
  using A = Accumulator<T>;
  constexpr int64_t kStep = kLanes<A>;
  const int64_t S = (p.width - 1) * p.dilation, K = p.state_size;
  const Taps<A, kWidth> taps(parameters, d, false);
  const Data<const T> x{static_cast<const T*>(p.x), p.x_stride};
  const Data<T> y{static_cast<T*>(p.y), p.y_stride};
  const Data<State> state{static_cast<State*>(p.conv_state.data), p.conv_state_stride};

  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t row = state_row(p, b);
    if (row < 0) {
      for (int64_t t = 0; t < p.tokens; ++t)
        for (int64_t c = 0; c < lanes; ++c) *y.at(b, d + c, t) = T{};
      continue;
    }
    for (int64_t s = 0; s < S; ++s) convert(state.at(row, d, K - S + s), state.stride.d, lanes, window + s * kStep);
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
    for (int64_t column = 0; column < K; ++column) {
      const int64_t token = column + p.tokens - K;
      for (int64_t c = 0; c < lanes; ++c)
        *state.at(row, d + c, column) = token < 0 ? *state.at(row, d + c, column + p.tokens)
                                                  : narrow<State>(widen(*x.at(b, d + c, token)));
    }
  }
}

void step(const StepParams& p) {
  visit_dtype(p.dtype, [&]<class T>() {
    using A = Accumulator<T>;
    const Parameters<A> parameters(p, p.silu ? kParameterScale<T, true> : kParameterScale<T, false>);
    const int64_t window_size = ((p.width - 1) * p.dilation + p.tokens) * kLanes<A>;
    const int64_t work = at_least(1, p.batch * (p.tokens + p.width) * kLanes<A>);  // elements per vector of channels
    visit_dtype(p.conv_state.dtype, [&]<class State>() {
      parallel_for(0, round_up(p.channels, kLanes<A>) / kLanes<A>, round_up(1 << 17, work) / work,
                   [&](int64_t begin, int64_t end) {
                     Scratch scratch(Scratch::bytes_of<A>(window_size));
                     A* const window = scratch.take<A>(window_size);
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t d = i * kLanes<A>;
                       const int lanes = static_cast<int>(at_most(kLanes<A>, p.channels - d));
                       step_channels<T, State, 0>(p, parameters, d, lanes, window);
                     }
                   });
    });
  });
}

}  // namespace
}  // namespace seqkern::causal_conv1d

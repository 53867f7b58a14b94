// What forward and backward share on the device: tokens of one channel, taps, and what lies before a sequence.
// Everything counts in processing time (common/sequences.cuh).
#pragma once

#include "causal_conv1d/params.h"
#include "causal_conv1d/tile.h"
#include "common/array.cuh"
#include "common/grid.cuh"
#include "common/load.cuh"
#include "common/math.cuh"
#include "common/sequences.cuh"

namespace seqkern::causal_conv1d::cuda {

// One channel of one batch row: token tau is at data[tau * step].
template <typename T>
struct Row {
  T* data;
  int64_t step;

  __device__ __forceinline__ Row(T* tensor, const Strides& stride, const Sequences& s, int64_t b, int64_t d)
      : data(tensor + b * stride.b + d * stride.d + (s.reverse && s.length > 0 ? (s.length - 1) * stride.l : 0)),
        step(s.reverse ? -stride.l : stride.l) {}
  __device__ __forceinline__ T* at(int64_t tau) const { return data + tau * step; }
};

// Row of the initial state, -1: none or none needed by tokens whose oldest tap is x_{oldest}.
__device__ __forceinline__ int64_t visible_initial_row(const Inputs& p, int64_t b, const Span& span, int64_t oldest) {
  return p.initial_state && oldest < span.begin ? initial_row(p.sequences, b, span) : -1;
}

// Row of the gradient of the final state, -1: none or none that holds tokens up to `newest`.
__device__ __forceinline__ int64_t visible_final_row(const Inputs& p, const Array& dfinal_state, int64_t b,
                                                     const Span& span, int64_t newest) {
  return dfinal_state && newest >= span.end - p.state_size() ? final_row(p.sequences, b, span) : -1;
}

// Element (row, d, column) of a state.
__device__ __forceinline__ int64_t state_index(const Inputs& p, int64_t row, int64_t d, int64_t column) {
  return (row * p.channels + d) * p.state_size() + column;
}

// Any token of one channel by single loads, for any W and dilation.
template <typename T>
struct Channel {
  using A = Accumulator<T>;
  const Inputs& p;
  int64_t b, d;
  Row<const T> x;

  __device__ __forceinline__ Channel(const Inputs& p_, int64_t b_, int64_t d_)
      : p(p_), b(b_), d(d_), x(static_cast<const T*>(p_.x), p_.x_stride, p_.sequences, b_, d_) {}

  // x_tau as a sequence sees it: from its initial state, or zero, before its begin [state].
  __device__ __forceinline__ A value(const Span& span, int64_t initial, int64_t tau) const {
    if (tau >= span.begin) return to<A>(load(x.at(tau)));
    if (initial < 0) return A(0);
    return load<A>(p.initial_state, state_index(p, initial, d, p.state_size() + tau - span.begin));
  }

  // pre_tau [conv]
  __device__ __forceinline__ A pre(const Span& span, int64_t initial, int64_t tau) const {
    A sum = p.bias ? load<A>(p.bias, d) : A(0);
    for (int64_t j = 0; j < p.width; ++j) {
      const A weight = load<A>(p.weight, d * p.width + j);
      sum = fma(weight, value(span, initial, tau - (p.width - 1 - j) * p.dilation), sum);
    }
    return sum;
  }
};

// An element of a (B, D, L) tensor by its place in the memory order of x, or rather in the order of processing.
struct Element {
  int64_t b, d, tau;

  __device__ __forceinline__ Element(const Inputs& p, int64_t i) {
    const bool time_contiguous = p.x_stride.l == 1;
    const auto [rest, fast] = divide(i, time_contiguous ? p.sequences.length : p.channels);
    const auto [batch, slow] = divide(rest, time_contiguous ? p.channels : p.sequences.length);
    b = batch, d = time_contiguous ? slow : fast, tau = time_contiguous ? fast : slow;
  }
};

// Weights and bias of one channel in registers, W <= kMaxTaps. weight[k] belongs to the token k steps back.
struct Taps {
  float weight[kMaxTaps];
  float bias;
};

__device__ __forceinline__ Taps load_taps(const Inputs& p, int64_t d) {
  Taps taps{};
  visit(p.weight, [&](const auto* weight) {
#pragma unroll
    for (int k = 0; k < kMaxTaps; ++k) {
      if (k < p.width) taps.weight[k] = to<float>(load(weight + (d + 1) * p.width - 1 - k));
    }
  });
  if (p.bias) taps.bias = load<float>(p.bias, d);
  return taps;
}

// pre of the token at window[i + kPast], oldest tap first [conv].
template <int kCount>
__device__ __forceinline__ float pre_of(const Taps& taps, int64_t width, const float (&window)[kCount], int i) {
  float sum = taps.bias;
#pragma unroll
  for (int k = kPast; k >= 0; --k) {
    if (k < width) sum = fma(taps.weight[k], window[i + kPast - k], sum);
  }
  return sum;
}

// The columns of a state next to a sequence: near[k - 1] is k tokens from its border.
struct Near {
  float near[kPast];

  __device__ __forceinline__ float at(int k) const {
    return k == 1 ? near[0] : k == 2 ? near[1] : k == 3 ? near[2] : 0.0f;
  }
};

// x_{begin - k}: the newest columns of row `row` of the initial state; zeros if there is none [state].
__device__ __forceinline__ Near newest_columns(const Inputs& p, const Array& state, int64_t row, int64_t d) {
  Near columns{};
  if (row < 0) return columns;
  visit(state, [&](const auto* data) {
#pragma unroll
    for (int k = 1; k <= kPast; ++k) {
      if (k < p.width) columns.near[k - 1] = to<float>(load(data + state_index(p, row, d, p.state_size() - k)));
    }
  });
  return columns;
}

// What a window from token `first` on needs of the time before `span`, which is entered at its token `begin` [state].
struct Past {
  int count;  // places of the window that lie before the span
  Near columns{};

  __device__ __forceinline__ Past(const Inputs& p, int64_t b, int64_t d, const Span& span, int64_t begin, int64_t first)
      : count(static_cast<int>(max(span.begin - first, int64_t{0}))) {
    if (count == 0) return;
    columns = newest_columns(p, p.initial_state, visible_initial_row(p, b, span, begin - p.state_size()), d);
  }

  template <int kCount>
  __device__ __forceinline__ void replace_in(float (&window)[kCount]) const {
    if (count == 0) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) window[i] = columns.at(count - i);
    }
  }
};

template <typename T, int kCount>
__device__ __forceinline__ Vector<T, kCount> reversed(const Vector<T, kCount>& v) {
  Vector<T, kCount> result;
#pragma unroll
  for (int i = 0; i < kCount; ++i) result[i] = v[kCount - 1 - i];
  return result;
}

template <int kCount, typename T>
__device__ __forceinline__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (sizeof(T) * kCount) == 0;
}

// Tokens [tau, tau + kCount) of a row whose time is contiguous, as memory holds them: from the lowest address on.
template <int kCount, typename T>
struct Tokens {
  T* lowest;
  bool backwards;

  __device__ __forceinline__ Tokens(const Row<T>& row, int64_t tau)
      : lowest(row.step > 0 ? row.at(tau) : row.at(tau + kCount - 1)), backwards(row.step < 0) {}

  // f(i) for the places in memory of tokens [tau + first, tau + last).
  template <typename F>
  __device__ __forceinline__ void for_each(int first, int last, F&& f) const {
    const int low = backwards ? kCount - last : first, high = backwards ? kCount - first : last;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (low <= i && i < high) f(i);
    }
  }
};

// A range of int64_t places, as far as it lies in [0, kCount).
template <int kCount>
__device__ __forceinline__ int clamp_to(int64_t place) {
  return static_cast<int>(clamp(place, 0, kCount));
}

// Tokens [tau, tau + kCount) of a row whose time is contiguous, in processing order; zeros outside [0, length).
template <int kCount, typename T>
__device__ __forceinline__ Vector<T, kCount> load_tokens(const Row<const T>& row, int64_t tau, int64_t length) {
  const Tokens<kCount, const T> tokens(row, tau);
  Vector<T, kCount> v;
  if (tau >= 0 && tau + kCount <= length && is_aligned<kCount>(tokens.lowest)) {
    v = load<kCount>(tokens.lowest);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = static_cast<T>(0.0f);
    tokens.for_each(clamp_to<kCount>(-tau), clamp_to<kCount>(length - tau),
                    [&](int i) { v[i] = load(tokens.lowest + i); });
  }
  return tokens.backwards ? reversed(v) : v;
}

// Elements [first, last) of v become tokens [tau + first, tau + last).
template <int kCount, typename T>
__device__ __forceinline__ void store_tokens(const Row<T>& row, int64_t tau, Vector<T, kCount> v, int first, int last) {
  const Tokens<kCount, T> tokens(row, tau);
  if (tokens.backwards) v = reversed(v);
  if (first == 0 && last == kCount && is_aligned<kCount>(tokens.lowest))
    store(tokens.lowest, v);
  else
    tokens.for_each(first, last, [&](int i) { store(tokens.lowest + i, v[i]); });
}

// How far before the row its first vector begins, for vectors of kCount tokens to be aligned.
template <int kCount, typename T>
__device__ __forceinline__ int vector_shift(const Row<const T>& row) {
  const T* lowest = row.step > 0 ? row.data : row.at(kCount - 1);
  const int offset = static_cast<int>(reinterpret_cast<uintptr_t>(lowest) / sizeof(T) % kCount);
  return row.step > 0 || offset == 0 ? offset : kCount - offset;
}

// The kVector neighbouring channels of a thread, those that exist.
template <int kVector>
struct Lanes {
  int64_t first;    // channel
  int count;        // of the channels that exist, at most kVector
  bool vectorized;  // then count is 0 or kVector

  __device__ __forceinline__ Lanes(const Inputs& p, const Cut& cut, int64_t first_)
      : first(first_), count(static_cast<int>(clamp(p.channels - first_, 0, kVector))), vectorized(cut.vectorized) {}

  // `token`: channel `first` of a token.
  template <typename T>
  __device__ __forceinline__ Vector<T, kVector> load_from(const T* token) const {
    if (vectorized && count > 0) return load<kVector>(token);
    Vector<T, kVector> v;
#pragma unroll
    for (int e = 0; e < kVector; ++e) v[e] = e < count ? load(token + e) : static_cast<T>(0.0f);
    return v;
  }

  template <typename T>
  __device__ __forceinline__ void store_to(T* token, const Vector<T, kVector>& v) const {
    if (vectorized && count > 0) return store(token, v);
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (e < count) store(token + e, v[e]);
    }
  }
};

template <typename T, int kVector>
__device__ __forceinline__ Vector<T, kVector> zeros() {
  Vector<T, kVector> v;
#pragma unroll
  for (int e = 0; e < kVector; ++e) v[e] = static_cast<T>(0.0f);
  return v;
}

// Registers of a thread that walks through time: the last kMaxTaps values of each of its channels, the newest last.
template <int kVector>
using Window = float[kVector][kMaxTaps];

template <int kVector>
__device__ __forceinline__ void push(Window<kVector>& window, int e, float value) {
#pragma unroll
  for (int k = 0; k < kPast; ++k) window[e][k] = window[e][k + 1];
  window[e][kPast] = value;
}

// The window on entering `span` at its token `begin`: x_{begin - kPast} .. x_{begin - 1} [state].
template <typename T, int kVector>
__device__ __forceinline__ void enter(Window<kVector>& window, const Inputs& p, const Lanes<kVector>& lanes,
                                      const Row<const T>& x, int64_t b, const Span& span, int64_t begin) {
  const int masked = clamp_to<kPast>(span.begin - begin + kPast);  // tokens that lie before the span
#pragma unroll
  for (int i = 0; i < kPast; ++i) {
    const Vector<T, kVector> v = i >= masked ? lanes.load_from(x.at(begin - kPast + i)) : zeros<T, kVector>();
#pragma unroll
    for (int e = 0; e < kVector; ++e) window[e][i + 1] = to<float>(v[e]);
  }
  const int64_t initial = visible_initial_row(p, b, span, begin - p.state_size());
  if (initial < 0) return;
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    if (e >= lanes.count) continue;
    const Near past = newest_columns(p, p.initial_state, initial, lanes.first + e);
#pragma unroll
    for (int i = 0; i < kPast; ++i) {
      if (i < masked) window[e][i + 1] = past.at(masked - i);
    }
  }
}

// Weights and bias of the kChannels channels of a block, as Taps holds them.
template <int kChannels>
struct SharedTaps {
  float value[kMaxTaps + 1][kChannels];

  // Of channels from `first` on, by all threads of the block; the caller synchronises.
  __device__ __forceinline__ void fill(const Inputs& p, int64_t first) {
    for (int i = threadIdx.x; i < min(int64_t{kChannels}, p.channels - first); i += blockDim.x) {
      const Taps taps = load_taps(p, first + i);
#pragma unroll
      for (int k = 0; k < kMaxTaps; ++k) value[k][i] = taps.weight[k];
      value[kMaxTaps][i] = taps.bias;
    }
  }

  __device__ __forceinline__ Taps at(int channel) const {
    Taps taps;
#pragma unroll
    for (int k = 0; k < kMaxTaps; ++k) taps.weight[k] = value[k][channel];
    taps.bias = value[kMaxTaps][channel];
    return taps;
  }
};

}  // namespace seqkern::causal_conv1d::cuda

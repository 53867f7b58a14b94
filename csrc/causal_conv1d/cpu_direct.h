// The convolution of common widths straight from x to y in memory: a pair of vectors at a time, 2 kLanes neighbours in
// time or in channels. A pair of float is two vectors one after the other; a pair of bfloat16 is one load, the even
// neighbours in the low halves of its 32-bit lanes and the odd ones in the high halves. Internal to cpu.cpp.
#pragma once
#include "causal_conv1d/cpu_piece.h"

namespace seqkern::causal_conv1d {
namespace {

constexpr int kPair = 2 * kLanes<float>;

template <class T>
constexpr bool kHasDirectForm = kSame<T, float> || kSame<T, BFloat16>;

inline void load_pair(const float* p, Float (&v)[2]) {
  v[0] = load<float>(p);
  v[1] = load<float>(p + kLanes<float>);
}
inline void load_pair(const BFloat16* p, Float (&v)[2]) {
  UInt bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  v[0] = bit_cast<Float>(bits << 16);
  v[1] = bit_cast<Float>(bits & 0xffff0000u);
}

// Half `half` of the pair at p + offset, where p is the start of a pair at offset 0.
inline Float load_half(const float* p, int half, int offset) {
  return load<float>(p + half * kLanes<float> + offset);
}
inline Float load_half(const BFloat16* p, int half, int offset) {
  const int first = half + offset;
  Float v[2];
  load_pair(p + (first & ~1), v);  // shared by the taps of both halves: `first` is a compile-time constant
  return v[first & 1];
}

template <bool kSilu>
inline void store_pair(float* y, const Float (&sum)[2]) {
  for (int half = 0; half < 2; ++half) store<float>(y + half * kLanes<float>, activation<float, kSilu>(sum[half]));
}
template <bool kSilu>
inline void store_pair(BFloat16* y, const Float (&sum)[2]) {
  const UInt even = activated_bits<kSilu>(sum[0]), odd = activated_bits<kSilu>(sum[1]);
  const UInt bits = even >> 16 | (odd & 0xffff0000u);
  __builtin_memcpy(y, &bits, sizeof bits);
}

// The rows of Parameters as convolve_channels reads them: lanes of each pair of channels as load_pair orders them.
template <class T>
struct PairedParameters {
  const Accumulator<T>* rows;

  explicit PairedParameters(const Parameters<Accumulator<T>>& parameters) : rows(parameters.rows()) {}
};
template <>
struct PairedParameters<BFloat16> {
  Scratch scratch;
  float* rows;

  explicit PairedParameters(const Parameters<float>& parameters)
      : scratch(Scratch::bytes_of<float>((parameters.width() + 1) * parameters.row())),
        rows(scratch.take<float>((parameters.width() + 1) * parameters.row())) {
    for (int64_t i = 0; i < (parameters.width() + 1) * parameters.row(); i += kPair) {
      Float pair[2], halves[2];
      for (int v = 0; v < 2; ++v) pair[v] = load<float>(parameters.rows() + i + v * kLanes<float>);
      split_columns<2, float>(pair, halves);
      for (int v = 0; v < 2; ++v) store<float>(rows + i + v * kLanes<float>, halves[v]);
    }
  }
};

// memcpy of a count that is mostly kUsual, and then no call.
template <int kUsual, class T>
inline void copy_some(const T* from, int64_t count, T* to) {
  if (count == kUsual)
    __builtin_memcpy(to, from, kUsual * sizeof(T));
  else
    __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
}

// Outputs `pairs` pairs of consecutive tokens. Reads up to kWidth tokens before x, or after its end for reverse.
template <int kWidth, bool kSilu, bool kReverse, class T>
void convolve_time(const T* x, const Taps<float, kWidth>& given, T* y, int64_t pairs) {
  const Taps<float, kWidth> taps = given;
  for (int64_t i = 0; i < pairs; ++i, x += kPair, y += kPair) {
    for (int64_t line = 0; line < kPair * static_cast<int64_t>(sizeof(T)); line += 64) {
      prefetch_read(x, kPrefetchBytes + line);
      prefetch_write(y, kPrefetchBytes + line);
    }
    Float sum[2] = {taps.bias, taps.bias};
    for (int j = 0; j < kWidth; ++j)
      for (int half = 0; half < 2; ++half)
        sum[half] = madd(taps.weight[j], load_half(x, half, kReverse ? kWidth - 1 - j : j - (kWidth - 1)), sum[half]);
    store_pair<kSilu>(y, sum);
  }
}

// Outputs 4 consecutive tokens of `pairs` pairs of channels. x: rows of the 4 + kWidth - 1 tokens read, y: of those
// written. parameters: as in PairedParameters, from the first of these channels on.
constexpr int kTokens = 4;

template <int kWidth, bool kSilu, bool kReverse, class T>
void convolve_channels(const T* const* x, const float* parameters, int64_t row, T* const* y, int64_t next_bytes,
                       int64_t pairs) {
  for (int64_t c = 0; c < pairs * kPair; c += kPair) {
    for (int i = 0; i < kTokens; ++i)
      for (int64_t line = 0; line < kPair * static_cast<int64_t>(sizeof(T)); line += 64) {
        prefetch_read(x[kWidth - 1 + i] + c, next_bytes + line);
      }
    Float v[kTokens + kWidth - 1][2];
    for (int i = 0; i < kTokens + kWidth - 1; ++i) load_pair(x[i] + c, v[i]);
    Float sum[kTokens][2];
    for (int half = 0; half < 2; ++half) {
      const float* const weight = parameters + c + half * kLanes<float>;
      for (int i = 0; i < kTokens; ++i) sum[i][half] = load<float>(weight + kWidth * row);
      for (int j = 0; j < kWidth; ++j) {
        const Float weight_j = load<float>(weight + j * row);
        for (int i = 0; i < kTokens; ++i)
          sum[i][half] = madd(weight_j, v[kReverse ? i + kWidth - 1 - j : i + j][half], sum[i][half]);
      }
    }
    for (int i = 0; i < kTokens; ++i) store_pair<kSilu>(y[i] + c, sum[i]);
  }
}

}  // namespace
}  // namespace seqkern::causal_conv1d

// The parameters of a causal convolution as vectors of accumulators, and what is done to its sums: the activation and
// the rounding of outputs. Internal to cpu.cpp.
#pragma once
#include "causal_conv1d/params.h"
#include "common/simd_math.h"

namespace seqkern::causal_conv1d {
namespace {

inline int64_t at_least(int64_t a, int64_t b) {
  return a > b ? a : b;
}
inline int64_t at_most(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return at_most(at_least(x, low), high);
}
inline int64_t round_up(int64_t x, int64_t unit) {
  return (x + unit - 1) / unit * unit;
}

// body.template operator()<kWidth>(): widths worth a compile-time constant, 0 for all others.
template <class Params, class Body>
inline void visit_width(const Params& p, const Body& body) {
  switch (p.width) {
    case 2:
      return body.template operator()<2>();
    case 3:
      return body.template operator()<3>();
    case 4:
      return body.template operator()<4>();
    default:
      return body.template operator()<0>();
  }
}

template <class Params, class Body>
inline void visit_width_and_silu(const Params& p, const Body& body) {
  visit_width(p, [&]<int kWidth>() {
    if (p.silu)
      body.template operator()<kWidth, true>();
    else
      body.template operator()<kWidth, false>();
  });
}

// For bfloat16 outputs with SiLU the sums are formed in the scale that silu_of_scaled takes, from scaled parameters.
template <class T, bool kSilu>
constexpr Accumulator<T> kParameterScale = kSilu && kSame<T, BFloat16> ? kSiluScale : 1;

template <class T, bool kSilu, class V>
inline V activation(V sum) {
  if constexpr (!kSilu)
    return sum;
  else if constexpr (kSame<T, BFloat16>)
    return silu_of_scaled(sum);
  else
    return silu(sum);
}

// The bfloat16 output in the upper half of each lane. SiLU's result is an approximation, whose ties mean nothing: it is
// rounded half up, and its NaN stay NaN because NaN never enter with low bits set (without_payload).
template <bool kSilu>
inline UInt activated_bits(Float sum) {
  const Float y = activation<BFloat16, kSilu>(sum);
  return kSilu ? bit_cast<UInt>(y) + 0x8000u : round_to_upper_half(y);
}

template <bool kSilu, class T, class A>
inline void store_activated(T* y, Vec<A> sum, int lanes) {
  if constexpr (kSame<T, BFloat16>) {
    const UInt bits = activated_bits<kSilu>(sum) >> 16;
    if (lanes == kLanes<A>) return store_low_halves(y, bits);
    T whole[kLanes<A>];
    store_low_halves(whole, bits);
    __builtin_memcpy(y, whole, static_cast<size_t>(lanes) * sizeof(T));
  } else {
    store<A>(y, activation<T, kSilu>(sum), lanes);
  }
}

template <class V>
inline V without_payload(V x) {
  return x == x ? x : V{} + __builtin_nanf("");
}

// weight and bias as accumulators, times `scale`, lanes last: (W + 1, padded D); row W is the bias, or zeros.
template <class A>
class Parameters {
 public:
  template <class Params>
  Parameters(const Params& p, A scale)
      : row_(round_up(p.channels, 2 * kLanes<A>)),
        width_(p.width),
        scratch_(Scratch::bytes_of<A>((p.width + 1) * row_)),
        rows_(scratch_.template take<A>((p.width + 1) * row_)) {
    visit_dtype(p.weight.dtype, [&]<class T>() {
      const T* const weight = static_cast<const T*>(p.weight.data);
      int64_t whole = 0;  // channels done by vectors
      visit_width(p, [&]<int kWidth>() {
        if constexpr (kWidth > 0) whole = split<kWidth>(weight, p.channels, scale);
      });
      for (int64_t j = 0; j < width_; ++j)
        fill(weight + whole * width_ + j, width_, whole, p.channels, scale, rows_ + j * row_);
    });
    if (p.bias)
      visit_dtype(p.bias.dtype, [&]<class T>() {
        fill(static_cast<const T*>(p.bias.data), 1, 0, p.channels, scale, rows_ + width_ * row_);
      });
    else
      fill(rows_, 0, 0, 0, scale, rows_ + width_ * row_);
  }

  int64_t width() const { return width_; }
  int64_t row() const { return row_; }
  const A* rows() const { return rows_; }
  // Row j of channel d on, or channel d in all lanes.
  Vec<A> get(int64_t j, int64_t d, bool one_channel) const {
    const A* const p = rows_ + j * row_ + d;
    return one_channel ? splat(*p) : load<A>(p);
  }

 private:
  template <class T>
  void fill(const T* from, int64_t stride, int64_t begin, int64_t end, A scale, A* row) {
    int64_t d = begin;
    if (stride == 1)
      for (; d + kLanes<A> <= end; d += kLanes<A>, from += kLanes<A>)
        store<A>(row + d, without_payload(load<A>(from) * scale));
    for (; d < end; ++d, from += stride) row[d] = without_payload(static_cast<A>(widen(*from)) * scale);
    for (int64_t d = end; d < row_; ++d) row[d] = 0;
  }

  template <int kWidth, class T>
  int64_t split(const T* weight, int64_t channels, A scale) {
    int64_t d = 0;
    for (; d + kLanes<A> <= channels; d += kLanes<A>) {
      Vec<A> rows[kWidth], columns[kWidth];
      for (int j = 0; j < kWidth; ++j) rows[j] = load<A>(weight + d * kWidth + j * kLanes<A>);
      split_columns<kWidth, A>(rows, columns);
      for (int j = 0; j < kWidth; ++j) store<A>(rows_ + j * row_ + d, without_payload(columns[j] * scale));
    }
    return d;
  }

  int64_t row_, width_;
  Scratch scratch_;
  A* rows_;
};

// The parameters of one vector of outputs.
template <class A, int kWidth>
struct Taps {
  Vec<A> weight[kWidth == 0 ? kMaxWidth : kWidth];
  Vec<A> bias;
  int runtime_width;

  Taps(const Parameters<A>& parameters, int64_t d, bool one_channel)
      : runtime_width(static_cast<int>(parameters.width())) {
    for (int j = 0; j < width(); ++j) weight[j] = parameters.get(j, d, one_channel);
    bias = parameters.get(width(), d, one_channel);
  }
  int width() const { return kWidth == 0 ? runtime_width : kWidth; }
};

}  // namespace
}  // namespace seqkern::causal_conv1d

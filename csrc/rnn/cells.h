// The cells [cell]: of a number S, which is one unit in a CUDA kernel and a vector of units on the CPU. A cell is all
// that the kernels know of a recurrence:
//
//   kGates, kCarried               G, C: the gates, and the numbers c that a unit carries beside h
//   kReadsH, kTwoSides             as in params.h
//   empty(c)                       c without a past; h without a past is 0
//   step(x, u, h, c)               m_t, of x_t, u_t = R h_{t-1} + bias, h_{t-1} (where it reads h), and c_{t-1}, which
//                                  becomes c_t
//   adjoint(x, u, h, c, dm, dc, dx, du)   with h and c those of t - 1. dc: from that of c_t to that of c_{t-1}. Sets
//   dx,
//                                  and du where they differ; returns what reaches h_{t-1} directly
//
// u need not be kept to the last bit: it enters the adjoint by functions of x + u alone.
#pragma once
#include "common/number.h"

namespace seqkern::rnn {
namespace {

// Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000. Gates i, f, g, o.
template <class S>
struct Lstm {
  static constexpr int kGates = 4, kCarried = 1;
  static constexpr bool kReadsH = false, kTwoSides = false;
  SEQKERN_FUNCTION static void empty(S (&c)[1]) { c[0] = S{}; }

  SEQKERN_FUNCTION static S step(const S (&x)[4], const S (&u)[4], S, S (&c)[1]) {
    const S i = sigmoid(x[0] + u[0]), f = sigmoid(x[1] + u[1]), g = tanh(x[2] + u[2]), o = sigmoid(x[3] + u[3]);
    c[0] = madd(f, c[0], i * g);
    return o * tanh(c[0]);
  }

  SEQKERN_FUNCTION static S adjoint(const S (&x)[4], const S (&u)[4], S, const S (&c)[1], S dm, S (&dc)[1], S (&dx)[4],
                                    S (&)[4]) {
    const S i = sigmoid(x[0] + u[0]), f = sigmoid(x[1] + u[1]), g = tanh(x[2] + u[2]), o = sigmoid(x[3] + u[3]);
    const S t = tanh(madd(f, c[0], i * g)), dc_t = madd(dm * o, 1 - t * t, dc[0]);
    dx[0] = dc_t * g * i * (1 - i);
    dx[1] = dc_t * c[0] * f * (1 - f);
    dx[2] = dc_t * i * (1 - g * g);
    dx[3] = dm * t * o * (1 - o);
    dc[0] = dc_t * f;
    return S{};
  }
};

// Cho et al. 2014 with the reset behind the product, as in cuDNN and torch. Gates r, z, n.
template <class S>
struct Gru {
  static constexpr int kGates = 3, kCarried = 0;
  static constexpr bool kReadsH = true, kTwoSides = true;
  using None = S[1];  // c has no numbers
  SEQKERN_FUNCTION static void empty(None&) {}

  SEQKERN_FUNCTION static S step(const S (&x)[3], const S (&u)[3], S h, None&) {
    const S r = sigmoid(x[0] + u[0]), z = sigmoid(x[1] + u[1]), n = tanh(madd(r, u[2], x[2]));
    return madd(z, h - n, n);
  }

  SEQKERN_FUNCTION static S adjoint(const S (&x)[3], const S (&u)[3], S h, const None&, S dm, None&, S (&dx)[3],
                                    S (&du)[3]) {
    const S r = sigmoid(x[0] + u[0]), z = sigmoid(x[1] + u[1]), n = tanh(madd(r, u[2], x[2]));
    dx[2] = dm * (1 - z) * (1 - n * n);
    dx[1] = dm * (h - n) * z * (1 - z);
    dx[0] = dx[2] * u[2] * r * (1 - r);
    du[0] = dx[0], du[1] = dx[1], du[2] = dx[2] * r;
    return dm * z;
  }
};

// sLSTM (Beck et al. 2024): c' = f c + i z, n' = f n + i, m' = o c' / n'. Gates i = exp(q), f = s(..), z = tanh(..),
// o = s(..). Carried as y = c / n, a mean of the z, and l = log n: no number grows like exp(q), none needs a scale
// beside it, and l = -inf is the empty state. With p = l + log f:
//   l' = log(exp(p) + exp(q)), v = exp(q - l') = s(q - p), y' = y + v (z - y), m' = o y'
template <class S>
struct Slstm {
  static constexpr int kGates = 4, kCarried = 2;
  static constexpr bool kReadsH = false, kTwoSides = false;
  SEQKERN_FUNCTION static void empty(S (&c)[2]) { c[0] = S{}, c[1] = S{} - __builtin_inff(); }

  // q - p; a token with i = 0 adds nothing, to an empty state as well.
  SEQKERN_FUNCTION static S over(S q, S p) {
    const S inf = S{} + __builtin_inff();
    return select(q == -inf, -inf, q - p);
  }

  SEQKERN_FUNCTION static S step(const S (&x)[4], const S (&u)[4], S, S (&c)[2]) {
    const S q = x[0] + u[0], p = c[1] - softplus(-(x[1] + u[1])), difference = over(q, p);
    const S z = tanh(x[2] + u[2]), o = sigmoid(x[3] + u[3]);
    c[0] = madd(sigmoid(difference), z - c[0], c[0]);
    c[1] = select(difference > 0, q, p) + softplus(select(difference > 0, -difference, difference));
    return o * c[0];
  }

  SEQKERN_FUNCTION static S adjoint(const S (&x)[4], const S (&u)[4], S, const S (&c)[2], S dm, S (&dc)[2], S (&dx)[4],
                                    S (&)[4]) {
    const S q = x[0] + u[0], f = x[1] + u[1], p = c[1] - softplus(-f), v = sigmoid(over(q, p));
    const S z = tanh(x[2] + u[2]), o = sigmoid(x[3] + u[3]), y = madd(v, z - c[0], c[0]);
    const S dy = madd(dm, o, dc[0]), dv = dy * v * (1 - v) * (z - c[0]), dp = dc[1] * (1 - v) - dv;
    dx[0] = madd(dc[1], v, dv), dx[1] = dp * sigmoid(-f);
    dx[2] = dy * v * (1 - z * z), dx[3] = dm * y * o * (1 - o);
    dc[0] = dy * (1 - v), dc[1] = dp;
    return S{};
  }
};

// m = phi(x + u) (Elman 1990), phi = tanh or relu.
template <class S, bool kRelu>
struct Elman {
  static constexpr int kGates = 1, kCarried = 0;
  static constexpr bool kReadsH = false, kTwoSides = false;
  using None = S[1];
  SEQKERN_FUNCTION static void empty(None&) {}

  SEQKERN_FUNCTION static S step(const S (&x)[1], const S (&u)[1], S, None&) {
    const S sum = x[0] + u[0];
    if constexpr (kRelu)
      return select(sum < 0, S{}, sum);  // NaN stays
    else
      return tanh(sum);
  }

  SEQKERN_FUNCTION static S adjoint(const S (&x)[1], const S (&u)[1], S h, const None& c, S dm, None&, S (&dx)[1],
                                    S (&)[1]) {
    if constexpr (kRelu) {
      dx[0] = select(x[0] + u[0] > 0, dm, S{});
    } else {
      None unchanged = {c[0]};
      const S t = step(x, u, h, unchanged);
      dx[0] = dm * (1 - t * t);
    }
    return S{};
  }
};
template <class S>
using ElmanTanh = Elman<S, false>;
template <class S>
using ElmanRelu = Elman<S, true>;

}  // namespace
}  // namespace seqkern::rnn

// The cells [cell]: of a number S, which is one channel in a CUDA kernel and a vector of channels on the CPU. A cell is
// all that the solvers, the backward and the step know of a recurrence:
//
//   kGates, kWeights, kStates    G, W, S
//   empty(), guess()             the state without a past; and where an iteration begins that knows nothing
//   step(w, x, s)                s_t of s_{t-1}
//   tangent(w, x, s, J)          the same, and J[i][j] = d s_t[i] / d s_{t-1}[j]
//   adjoint(w, x, s, ds, dx, dw) from ds = the gradient of s_t to that of s_{t-1}; sets dx, adds to dw
//
// Every solver must round alike: step and tangent share the lines that make the state, in which products are added by
// madd and nowhere else.
#pragma once

#include "common/number.h"

namespace seqkern::elementwise_rnn {
namespace {

// ParaGRU (Danieli et al. 2025):  z = s(a_z h + x_z), r = s(a_r h + x_r), n = tanh(a_n h r + x_n),
// h' = (1 - z) h + z n. Gates z, r, n; weights a_z, a_r, a_n.
template <class S>
struct Gru {
  static constexpr int kGates = 3, kWeights = 3, kStates = 1;
  static constexpr bool kPublishesState = true;
  struct Gates {
    S z, r, n;
  };
  SEQKERN_FUNCTION static void empty(S (&s)[1]) { s[0] = S{}; }
  SEQKERN_FUNCTION static void guess(S (&s)[1]) { s[0] = S{}; }

  SEQKERN_FUNCTION static Gates advance(const S (&w)[3], const S (&x)[3], S (&s)[1]) {
    const S h = s[0];
    const S z = sigmoid(madd(w[0], h, x[0])), r = sigmoid(madd(w[1], h, x[1]));
    const S n = tanh(madd(w[2] * h, r, x[2]));
    s[0] = madd(z, n - h, h);
    return {z, r, n};
  }
  SEQKERN_FUNCTION static void step(const S (&w)[3], const S (&x)[3], S (&s)[1]) { advance(w, x, s); }

  SEQKERN_FUNCTION static void tangent(const S (&w)[3], const S (&x)[3], S (&s)[1], S (&J)[1][1]) {
    const S h = s[0];
    const Gates g = advance(w, x, s);
    const S dz = (g.n - h) * g.z * (1 - g.z), dr = h * g.r * (1 - g.r), dn = g.z * (1 - g.n * g.n);
    J[0][0] = (1 - g.z) + dz * w[0] + dn * w[2] * (g.r + dr * w[1]);
  }

  SEQKERN_FUNCTION static void adjoint(const S (&w)[3], const S (&x)[3], const S (&s)[1], S (&ds)[1], S (&dx)[3],
                                       S (&dw)[3]) {
    const S h = s[0];
    S after[1] = {h};
    const Gates g = advance(w, x, after);
    dx[0] = ds[0] * (g.n - h) * g.z * (1 - g.z);
    dx[2] = ds[0] * g.z * (1 - g.n * g.n);
    dx[1] = dx[2] * w[2] * h * g.r * (1 - g.r);
    dw[0] = madd(dx[0], h, dw[0]), dw[1] = madd(dx[1], h, dw[1]), dw[2] = madd(dx[2] * h, g.r, dw[2]);
    ds[0] = ds[0] * (1 - g.z) + dx[0] * w[0] + dx[1] * w[1] + dx[2] * w[2] * g.r;
  }
};

// ParaLSTM (Danieli et al. 2025): one gate keeps and lets in, and looks through peepholes.
// f = s(a_f h + c_f c + x_f), g = tanh(a_g h + x_g), c' = f c + (1 - f) g, o = s(a_o h + c_o c' + x_o),
// h' = o tanh(c'). Gates f, g, o; weights a_f, a_g, a_o, c_f, c_o; state (h, c).
template <class S>
struct Lstm {
  static constexpr int kGates = 3, kWeights = 5, kStates = 2;
  static constexpr bool kPublishesState = true;
  struct Gates {
    S f, g, o, t;  // t = tanh(c')
  };
  SEQKERN_FUNCTION static void empty(S (&s)[2]) { s[0] = s[1] = S{}; }
  SEQKERN_FUNCTION static void guess(S (&s)[2]) { s[0] = s[1] = S{}; }

  SEQKERN_FUNCTION static Gates advance(const S (&w)[5], const S (&x)[3], S (&s)[2]) {
    const S h = s[0], c = s[1];
    const S f = sigmoid(madd(w[0], h, madd(w[3], c, x[0]))), g = tanh(madd(w[1], h, x[1]));
    s[1] = madd(f, c - g, g);
    const S o = sigmoid(madd(w[2], h, madd(w[4], s[1], x[2]))), t = tanh(s[1]);
    s[0] = o * t;
    return {f, g, o, t};
  }
  SEQKERN_FUNCTION static void step(const S (&w)[5], const S (&x)[3], S (&s)[2]) { advance(w, x, s); }

  SEQKERN_FUNCTION static void tangent(const S (&w)[5], const S (&x)[3], S (&s)[2], S (&J)[2][2]) {
    const S c = s[1];
    const Gates g = advance(w, x, s);
    const S df = (c - g.g) * g.f * (1 - g.f), dg = (1 - g.f) * (1 - g.g * g.g), d_o = g.t * g.o * (1 - g.o);
    const S dt = g.o * (1 - g.t * g.t) + d_o * w[4];  // d h' / d c'
    J[1][0] = df * w[0] + dg * w[1], J[1][1] = g.f + df * w[3];
    J[0][0] = d_o * w[2] + dt * J[1][0], J[0][1] = dt * J[1][1];
  }

  SEQKERN_FUNCTION static void adjoint(const S (&w)[5], const S (&x)[3], const S (&s)[2], S (&ds)[2], S (&dx)[3],
                                       S (&dw)[5]) {
    const S h = s[0], c = s[1];
    S after[2] = {h, c};
    const Gates g = advance(w, x, after);
    dx[2] = ds[0] * g.t * g.o * (1 - g.o);
    const S dc = ds[1] + ds[0] * g.o * (1 - g.t * g.t) + dx[2] * w[4];
    dx[0] = dc * (c - g.g) * g.f * (1 - g.f), dx[1] = dc * (1 - g.f) * (1 - g.g * g.g);
    dw[0] = madd(dx[0], h, dw[0]), dw[1] = madd(dx[1], h, dw[1]), dw[2] = madd(dx[2], h, dw[2]);
    dw[3] = madd(dx[0], c, dw[3]), dw[4] = madd(dx[2], after[1], dw[4]);
    ds[0] = dx[0] * w[0] + dx[1] * w[1] + dx[2] * w[2];
    ds[1] = dc * g.f + dx[0] * w[3];
  }
};

// sLSTM (Beck et al. 2024) with elementwise recurrent weights: c' = f c + i z, n' = f n + i, h' = o c' / n' with
// i = exp(q), f = s(..), z = tanh(..), o = s(..). Gates i, f, z, o; weights a_i, a_f, a_z, a_o.
// Carried as (h, y, l) with y = c / n, a mean of the z, and l = log n: no number of it grows like exp(q), none needs a
// scale beside it, and l = -inf is the empty state. With p = l + log f:
//   l' = log(exp(p) + exp(q)), v = exp(q - l') = s(q - p), y' = y + v (z - y), h' = o y'
template <class S>
struct Slstm {
  static constexpr int kGates = 4, kWeights = 4, kStates = 3;
  static constexpr bool kPublishesState = false;
  struct Gates {
    S not_f, v, z, o;
  };
  SEQKERN_FUNCTION static void empty(S (&s)[3]) { s[0] = s[1] = S{}, s[2] = S{} - __builtin_inff(); }
  SEQKERN_FUNCTION static void guess(S (&s)[3]) { s[0] = s[1] = s[2] = S{}; }

  SEQKERN_FUNCTION static Gates advance(const S (&w)[4], const S (&x)[4], S (&s)[3]) {
    const S h = s[0], y = s[1];
    const S q = madd(w[0], h, x[0]), f = madd(w[1], h, x[1]);
    const S z = tanh(madd(w[2], h, x[2])), o = sigmoid(madd(w[3], h, x[3]));
    const S p = s[2] - softplus(-f), inf = S{} + __builtin_inff();
    const S over = select(q == -inf, -inf, q - p);  // a token with i = 0 adds nothing, to an empty state as well
    const S v = sigmoid(over);
    s[2] = select(over > 0, q, p) + softplus(select(over > 0, -over, over));
    s[1] = madd(v, z - y, y);
    s[0] = o * s[1];
    return {sigmoid(-f), v, z, o};
  }
  SEQKERN_FUNCTION static void step(const S (&w)[4], const S (&x)[4], S (&s)[3]) { advance(w, x, s); }

  SEQKERN_FUNCTION static void tangent(const S (&w)[4], const S (&x)[4], S (&s)[3], S (&J)[3][3]) {
    const S y = s[1];
    const Gates g = advance(w, x, s);
    const S dv = g.v * (1 - g.v) * (g.z - y), dz = g.v * (1 - g.z * g.z);
    J[1][0] = dv * (w[0] - g.not_f * w[1]) + dz * w[2], J[1][1] = 1 - g.v, J[1][2] = -dv;
    J[2][0] = g.v * w[0] + (1 - g.v) * g.not_f * w[1], J[2][1] = S{}, J[2][2] = 1 - g.v;
    J[0][0] = s[0] * (1 - g.o) * w[3] + g.o * J[1][0], J[0][1] = g.o * J[1][1], J[0][2] = g.o * J[1][2];
  }

  SEQKERN_FUNCTION static void adjoint(const S (&w)[4], const S (&x)[4], const S (&s)[3], S (&ds)[3], S (&dx)[4],
                                       S (&dw)[4]) {
    const S h = s[0], y = s[1];
    S after[3] = {h, y, s[2]};
    const Gates g = advance(w, x, after);
    const S dy = madd(ds[0], g.o, ds[1]), dv = dy * g.v * (1 - g.v) * (g.z - y);
    const S dp = ds[2] * (1 - g.v) - dv;
    dx[0] = madd(ds[2], g.v, dv), dx[1] = dp * g.not_f;
    dx[2] = dy * g.v * (1 - g.z * g.z), dx[3] = ds[0] * after[0] * (1 - g.o);
    ds[0] = S{};
    for (int i = 0; i < 4; ++i) dw[i] = madd(dx[i], h, dw[i]), ds[0] = madd(dx[i], w[i], ds[0]);
    ds[1] = dy * (1 - g.v), ds[2] = dp;
  }
};

// h' = phi(a h + x); IndRNN (Li et al. 2018) with relu, Elman (1990) with tanh. One gate, one weight.
template <class S, bool kRelu>
struct Plain {
  static constexpr int kGates = 1, kWeights = 1, kStates = 1;
  static constexpr bool kPublishesState = true;
  SEQKERN_FUNCTION static void empty(S (&s)[1]) { s[0] = S{}; }
  SEQKERN_FUNCTION static void guess(S (&s)[1]) { s[0] = S{}; }

  // Returns phi'.
  SEQKERN_FUNCTION static S advance(const S (&w)[1], const S (&x)[1], S (&s)[1]) {
    const S sum = madd(w[0], s[0], x[0]);
    if constexpr (kRelu) {
      s[0] = select(sum < 0, S{}, sum);  // NaN stays
      return select(sum > 0, S{} + 1, S{});
    } else {
      s[0] = tanh(sum);
      return 1 - s[0] * s[0];
    }
  }
  SEQKERN_FUNCTION static void step(const S (&w)[1], const S (&x)[1], S (&s)[1]) { advance(w, x, s); }
  // Just below the kink of relu the slope counts as 1: a solver whose state is off by less must not think that nothing
  // grows there.
  SEQKERN_FUNCTION static void tangent(const S (&w)[1], const S (&x)[1], S (&s)[1], S (&J)[1][1]) {
    if constexpr (kRelu) {
      const S near = madd(w[0], s[0], x[0]) + 1e-3f;
      J[0][0] = select(near > 0, w[0], S{});
      advance(w, x, s);
    } else {
      J[0][0] = w[0] * advance(w, x, s);
    }
  }
  SEQKERN_FUNCTION static void adjoint(const S (&w)[1], const S (&x)[1], const S (&s)[1], S (&ds)[1], S (&dx)[1],
                                       S (&dw)[1]) {
    S after[1] = {s[0]};
    dx[0] = ds[0] * advance(w, x, after);
    dw[0] = madd(dx[0], s[0], dw[0]);
    ds[0] = dx[0] * w[0];
  }
};
template <class S>
using IndRnn = Plain<S, true>;
template <class S>
using Elman = Plain<S, false>;

}  // namespace
}  // namespace seqkern::elementwise_rnn

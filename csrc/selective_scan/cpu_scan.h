// The recurrence and its derivative, of some states of one vector of channels over the tokens of a tile.
// Internal to cpu.cpp.
#pragma once
#include "selective_scan/cpu_number.h"
#include "selective_scan/cpu_tile.h"
#include "selective_scan/params.h"

namespace seqkern::selective_scan {
namespace {

// States whose values stay in registers over a tile. body.template operator()<kStates>(first): all N in such blocks.
constexpr int kStatesOfBlock = 4;

template <class Body>
inline void for_each_state_block(int64_t states, const Body& body) {
  int64_t n = 0;
  for (; n + kStatesOfBlock <= states; n += kStatesOfBlock) body.template operator()<kStatesOfBlock>(n);
  for (; n < states; ++n) body.template operator()<1>(n);
}

// B or C of the tokens of a tile. Variable: an accumulator per token and state, the same for all channels. Constant: a
// number (of kLanes channels) per state.
template <class F>
struct Coefficients {
  using A = typename F::A;

  const A* p;
  bool constant;
  int64_t token, im;  // variable: strides of tokens, and from a real part to its imaginary part

  typename F::Number at(int64_t i, int64_t n) const {
    if constexpr (!F::kPlain)
      if (constant) return F::load(p + n * F::kWidth);
    return F::broadcast(p + i * token + n, im);
  }
};

// A vector of channels over the tokens of a tile, in the order of processing; each array is (tokens, kLanes).
template <class F>
struct Tile {
  using A = typename F::A;

  int64_t tokens;
  bool two_exp;
  Coefficients<F> B, C;
  const A* delta;  // delta'
  const A* x;      // delta' u
  A* sum;          // Re sum_n C h
};

// For the derivative, besides. Sums over n and, at strides of 0, over tokens; the others are one per token and state.
template <class F>
struct Gradients {
  using A = typename F::A;

  const A* dout;
  A* dB_sum;  // Re sum_n conj(B) g
  A* dA_sum;  // Re sum_n conj(A) e
  // Gradients of B and C, numbers: of token i, state n of the block at dB[i dB_token + n]
  A *dB, *dC;
  int64_t dB_token, dC_token;
};

// [decay]
template <class F>
inline typename F::Number decay(bool two_exp, typename F::V delta, typename F::Number scaled) {
  typename F::Number a = exp_of_scaled(delta, scaled);
  if constexpr (!F::kPlain)
    if (two_exp) a = two_exp_minus_one(a);
  return a;
}

// Adds Re sum_n C h of kStates states from `n` on. h (kStates numbers) are the states before the tile and become those
// after it. kKeep: a_t and h_{t-1} of all tokens are written to kept_a and kept_h, the last h_t behind these.
template <class F, int kStates, bool kKeep>
void advance(const Tile<F>& tile, int64_t n, const typename F::A* scaled_A, typename F::A* h_memory,
             typename F::A* kept_a, typename F::A* kept_h, const Ahead& ahead) {
  using A = typename F::A;
  using Number = typename F::Number;
  Number h[kStates], scaled[kStates];
  for (int j = 0; j < kStates; ++j) {
    h[j] = F::load(h_memory + (n + j) * F::kWidth);
    scaled[j] = F::load(scaled_A + (n + j) * F::kWidth);
    if (kKeep) F::store(kept_h + j * F::kWidth, h[j]);
  }
  for (int64_t i = 0; i < tile.tokens; ++i) {
    const Vec<A> delta = load<A>(tile.delta + i * kLanes<A>), x = load<A>(tile.x + i * kLanes<A>);
    Vec<A> sum = load<A>(tile.sum + i * kLanes<A>);
    ahead.fetch(i);
    for (int j = 0; j < kStates; ++j) {
      const Number a = decay<F>(tile.two_exp, delta, scaled[j]);
      h[j] = madd(a, h[j], scale(x, tile.B.at(i, n + j)));  // [state]
      sum = madd_real(tile.C.at(i, n + j), h[j], sum);      // [out]
      if (kKeep) {
        F::store(kept_a + (i * kStates + j) * F::kWidth, a);
        F::store(kept_h + ((i + 1) * kStates + j) * F::kWidth, h[j]);
      }
    }
    store<A>(tile.sum + i * kLanes<A>, sum);
  }
  for (int j = 0; j < kStates; ++j) F::store(h_memory + (n + j) * F::kWidth, h[j]);
}

// The same tokens, last to first. carry (kStates numbers) is conj(a) g of the token after the tile and becomes that of
// its first token; dA is added to.
template <class F, int kStates>
void differentiate(const Tile<F>& tile, const Gradients<F>& grad, int64_t n, const typename F::A* A_memory,
                   typename F::A* carry_memory, typename F::A* dA_memory, const typename F::A* kept_a,
                   const typename F::A* kept_h) {
  using A = typename F::A;
  using Number = typename F::Number;
  Number carry[kStates], A_of[kStates];
  Number dA[kStates] = {};  // of the tile: sums of sums err less than one long sum
  for (int j = 0; j < kStates; ++j) {
    carry[j] = F::load(carry_memory + (n + j) * F::kWidth);
    A_of[j] = conj(F::load(A_memory + (n + j) * F::kWidth));
  }
  for (int64_t i = tile.tokens - 1; i >= 0; --i) {
    const Vec<A> delta = load<A>(tile.delta + i * kLanes<A>), x = load<A>(tile.x + i * kLanes<A>);
    const Vec<A> dout = load<A>(grad.dout + i * kLanes<A>) * A{F::kParts};
    Vec<A> dB_sum = load<A>(grad.dB_sum + i * kLanes<A>), dA_sum = load<A>(grad.dA_sum + i * kLanes<A>);
    for (int j = 0; j < kStates; ++j) {
      const Number a = F::load(kept_a + (i * kStates + j) * F::kWidth);
      const Number before = F::load(kept_h + (i * kStates + j) * F::kWidth);
      const Number h = F::load(kept_h + ((i + 1) * kStates + j) * F::kWidth);
      const Number g = madd(dout, conj(tile.C.at(i, n + j)), carry[j]);  // [dstate]
      A* const dB = grad.dB + i * grad.dB_token + j * F::kWidth;
      A* const dC = grad.dC + i * grad.dC_token + j * F::kWidth;
      F::store(dC, madd(dout, conj(h), F::load(dC)));            // [dC]
      F::store(dB, madd(x, g, F::load(dB)));                     // [dB]
      dB_sum = madd_real(conj(tile.B.at(i, n + j)), g, dB_sum);  // [du]
      carry[j] = product(conj(a), g);
      Number e = carry[j];
      if constexpr (!F::kPlain)
        if (tile.two_exp) e = e + g;
      e = product(e, conj(before));
      dA[j] = madd(delta, e, dA[j]);           // [dA]
      dA_sum = madd_real(A_of[j], e, dA_sum);  // [ddelta]
    }
    store<A>(grad.dB_sum + i * kLanes<A>, dB_sum);
    store<A>(grad.dA_sum + i * kLanes<A>, dA_sum);
  }
  for (int j = 0; j < kStates; ++j) {
    F::store(carry_memory + (n + j) * F::kWidth, carry[j]);
    F::store(dA_memory + (n + j) * F::kWidth, F::load(dA_memory + (n + j) * F::kWidth) + dA[j]);
  }
}

}  // namespace
}  // namespace seqkern::selective_scan

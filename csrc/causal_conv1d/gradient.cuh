// What the backward kernels of all paths share: gradients of single elements.
#pragma once

#include "causal_conv1d/window.cuh"

namespace seqkern::causal_conv1d::cuda {

// The gradient of pre_t: dy_t, or dy_t silu'(pre_t).
template <typename T, typename A>
__device__ __forceinline__ A dpre_of(const Inputs& p, A pre, A dy) {
  return p.silu ? dy * silu_derivative<T>(pre) : dy;
}

// What the final state of row `final` (-1: none) adds to dx_tau, or to the gradient of an initial state's x_tau [dx].
template <typename A>
__device__ __forceinline__ A dfinal_of(const BwdParams& p, int64_t final, int64_t d, const Span& span, int64_t tau) {
  const int64_t column = p.state_size() - span.end + tau;
  if (final < 0 || column < 0) return A(0);
  return load(static_cast<const A*>(p.dfinal_state.data) + state_index(p, final, d, column));
}

// [dx] at tau = begin - S + c: dinitial_state_{n,d,c}. dpre(span, tau): of a token of the sequence.
template <typename T, typename Dpre>
__device__ __forceinline__ void write_dinitial_state(const BwdParams& p, int64_t i, Dpre&& dpre) {
  if (i >= state_elements(p)) return;
  const auto [nd, column] = divide(i, p.state_size());
  const auto [n, d] = divide(nd, p.channels);
  const int64_t b = p.sequences.cu_seqlens ? 0 : n;
  const Span span = span_of_state(p.sequences, n, true, p.state_size());
  const int64_t tau = span.begin - p.state_size() + column;
  const int64_t final = visible_final_row(p, p.dfinal_state, b, span, tau);
  Accumulator<T> sum = dfinal_of<Accumulator<T>>(p, final, d, span, tau);
  for (int64_t k = 0; k < p.width; ++k) {
    const int64_t later = tau + k * p.dilation;
    if (later < span.begin || later >= span.end) continue;
    sum = fma(load<Accumulator<T>>(p.weight, (d + 1) * p.width - 1 - k), dpre(b, d, span, later), sum);
  }
  store(p.dinitial_state, i, sum);
}

// The launches of the general path before the reduction.
void bwd_general(const BwdParams&, const Plan&, Stream);

}  // namespace seqkern::causal_conv1d::cuda

// What forward and backward do with the gates of a chunk (common/chunk.cuh).
#pragma once

#include "common/chunk.cuh"
#include "linear_attention/params.h"

namespace seqkern::linear_attention::cuda {

__device__ __forceinline__ StateShape state_shape(const Inputs& in) {
  return {in.value_heads, in.keys, in.size, in.value_major};
}

// --- gates of a head: one number per token

// [gate] of one token: g and w, and what they were made of.
template <typename R>
struct Gate {
  R g, w;
  R delta;        // before the limits; kDelta
  R f, input, m;  // m_t; kExp
};

// Gates of the tokens of a chunk, kept by a block in shared memory.
//   decay(i, j) = exp(r_i - c_j);  read[i] = exp(r_i);  carry[j] = w_j exp(c_C - c_j);  total = exp(c_C)
template <typename R, int kTokens>
struct TokenGates {
  LongSum<R> c[kTokens];
  R weight[kTokens], read[kTokens], carry[kTokens];
  R maximum[kTokens];
  R total, last_maximum;
  R forget;  // sum of f_t; kExp

  template <typename T>
  __device__ __forceinline__ R decay(int i, int j, bool read_previous) const {
    return exp_of<T>(c[read_previous ? i - 1 : i] - c[j]);
  }
};

// Gate of token i of a chunk, without what depends on m.
template <typename R>
__device__ __forceinline__ Gate<R> load_gate(const Inputs& in, const Rows& decay, const Rows& input, int64_t h, int i,
                                             bool exists) {
  const Gates& gates = in.gates;
  Gate<R> gate{R(0), exists ? R(1) : R(0), R(0), R(0), -kInfinity<R>, R(0)};
  if (!exists) return gate;
  switch (gates.form) {
    case Form::kNone:
    case Form::kKey:
      break;
    case Form::kToken:
      gate.g = clamp_decay(load<R>(array_of(gates.decay), decay[i]));
      break;
    case Form::kDelta: {
      R delta = load<R>(array_of(gates.decay), decay[i]) + (gates.bias ? load<R>(gates.bias, h) : R(0));
      if (gates.softplus) delta = softplus(delta);
      gate.delta = delta;
      const R low = static_cast<R>(gates.low), high = static_cast<R>(gates.high);
      gate.w = delta < low ? low : delta > high ? high : delta;
      gate.g = clamp_decay(gate.w * load<R>(gates.A, h));
      break;
    }
    case Form::kExp:
      gate.f = -softplus(-load<R>(array_of(gates.decay), decay[i]));
      gate.input = load<R>(array_of(gates.input), input[i]);
      break;
  }
  return gate;
}

// [gate] and [chunk] decays of a chunk, by one warp; `m` is the maximum before it.
template <typename T, typename R, int kTokens>
__device__ __forceinline__ void take_gates(TokenGates<R, kTokens>& shared, const Inputs& in, int64_t b, int64_t h,
                                           const Chunk& chunk, R m) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % kWarpSize;
  const Rows decay(in.gates.decay, in.sequences, b, chunk.begin, h),
      input(in.gates.input, in.sequences, b, chunk.begin, h);
  LongSum<R> sum{R(0), R(0)};
  R forget = R(0);
#pragma unroll 1
  for (int first = 0; first < kTokens; first += kWarpSize) {
    const int token = first + lane;
    Gate<R> x = load_gate<R>(in, decay, input, h, token, token < chunk.count);
    if (in.gates.form == Form::kExp) {
      const int count = min(chunk.count - first, kWarpSize);
#pragma unroll 2
      for (int i = 0; i < count; ++i) {
        const R kept = __shfl_sync(kAll, x.f, i) + m, entered = __shfl_sync(kAll, x.input, i);
        m = entered > kept || entered != entered ? entered : kept;
        if (lane != i) continue;
        const bool empty = m == -kInfinity<R>;
        x.m = m;
        x.g = empty ? kVanished<R> : clamp_decay(kept - m);  // forgets what was there
        x.w = empty ? R(0) : exp_of<T>(entered - m);
      }
      forget += warp_sum(x.f);
    }
    const auto [before, c] = running_sums(x.g, sum);
    if (token >= kTokens) continue;
    const LongSum<R> r = in.read_previous ? before : c;
    shared.c[token] = c, shared.weight[token] = x.w, shared.read[token] = exp_of<T>(r.high + r.low);
    shared.maximum[token] = x.m;
  }
#pragma unroll 1
  for (int token = lane; token < kTokens; token += kWarpSize) {
    shared.carry[token] = shared.weight[token] * exp_of<T>(sum - shared.c[token]);
  }
  if (lane == 0) shared.total = exp_of<T>(sum.high + sum.low), shared.last_maximum = m, shared.forget = forget;
}

}  // namespace seqkern::linear_attention::cuda

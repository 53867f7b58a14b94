// The last kernel of the backward where every key has a decay of its own. Within a chunk, pairs of tokens are taken one
// by one, a thread for each key: what a token holds decays as the thread goes from token to token, so that no factor
// exceeds 1.
#pragma once

#include "delta_rule/bwd_tokens.cuh"

namespace seqkern::delta_rule::cuda {

template <typename T, int kC, int kK, int kV>
struct KeyTiles : TokensTiles<T, kC, kK, kV> {
  using R = Accumulator<T>;

  Matrix<R, kC, kK> z;       // z_i of a reader, then its gradient; at the end the inter part of dk_j
  Matrix<R, kC, kK> decays;  // q_i * dq_i + e_i * de_i - k_i * (intra part of dk_i)
};
template <typename T, int kC, int kK, int kV>
struct KeyShared : TokensShared<KeyTiles<T, kC, kK, kV>, T, kC, kK> {
  using R = Accumulator<T>;

  R scores[kC][kC];  // dO_i . u_j or w_i . u_j of the tokens that i reads
  R read_parts[kK / kWarpSize][kC];
};

template <typename T, int kC, int kK, int kV>
struct KeyDecays : TokensBase<KeyDecays<T, kC, kK, kV>, T, kC, kK, kV, KeyShared<T, kC, kK, kV>> {
  using Base = TokensBase<KeyDecays<T, kC, kK, kV>, T, kC, kK, kV, KeyShared<T, kC, kK, kV>>;
  using Base::Base, Base::p, Base::shared, Base::rows, Base::work;
  using typename Base::Keys, typename Base::Pairs, typename Base::R;

  __device__ __forceinline__ void begin() {}

  __device__ __forceinline__ void take(Reader reader, Keys& z, Pairs& s) {
    z.for_each([&](int i, int key, R& sum) { shared.z[i][key] = sum; });
    if (reader == kWriter) {
      __syncthreads();
      for_each_key([&](int key) { carry(key); });
      add_gradient(reader, z);
      return;
    }
    s.for_each([&](int i, int j, R& sum) { shared.scores[i][j] = j < i || (j == i && reader == kQuery) ? sum : R(0); });
    __syncthreads();
    for_each_key([&](int key) { read_pairs(reader, key); });
    add_gradient(reader, z);
    for_each_key([&](int key) { carry_pairs(reader, key); });
    add_gradient(kWriter, z);
    this->for_each_token([&](int i) { shared.reads[reader][i] = sum_parts(shared.read_parts, i); });
  }

  // [ddecay]
  __device__ __forceinline__ void write_decays() {
    const Rows decay = rows(p.decay, work().hv), to_rows = rows(p.ddecay, work().hv), of_k = rows(p.k, work().h);
    for_each_key([&](int key) {
      if (key >= p.keys) return;
      R later = R(0);
#pragma unroll 1
      for (int t = work().at.chunk.count - 1; t >= 0; --t)
        later += shared.decays[t][key], shared.decays[t][key] = later;
      R before = shared.states_dot[key] * seqkern::load(this->scores.total(work().slot, work().hv) + key);
#pragma unroll 1
      for (int t = 0; t < work().at.chunk.count; ++t) {
        const R g = seqkern::load<R>(array_of(p.decay), decay[t] + key), dg = shared.decays[t][key] + before;
        store(array_of(p.ddecay), to_rows[t] + key, g <= kVanished<R> ? dg * R(0) : dg);  // NaN stays
        before = fma(this->element(p.k, of_k, t, key), shared.z[t][key], before);
      }
    });
  }

 private:
  template <typename F>
  __device__ __forceinline__ static void for_each_key(F&& f) {
    if (threadIdx.x < kK) f(static_cast<int>(threadIdx.x));
  }
  // The gradient that threads have left in z.
  __device__ __forceinline__ void add_gradient(Reader reader, Keys& z) {
    __syncthreads();
    z.for_each([&](int i, int key, R& sum) { sum = shared.z[i][key]; });
    this->add(reader, z);
    __syncthreads();
  }

  // Of a key and token: exp(g), and normalized k, and q or e.
  struct Token {
    R a, k, x;
  };
  struct TokensOfKey {
    const KeyDecays& walk;
    Reader reader;
    int key;
    Rows decay, of_k, of_x;

    __device__ __forceinline__ TokensOfKey(const KeyDecays& walk_, Reader reader_, int key_)
        : walk(walk_),
          reader(reader_),
          key(key_),
          decay(walk.rows(walk.p.decay, walk.work().hv)),
          of_k(walk.rows(walk.p.k, walk.work().h)),
          of_x(walk.rows(walk.rows_of(reader_), walk.work().h)) {}
    __device__ __forceinline__ Token operator[](int i) const {
      if (i < 0 || i >= walk.work().at.chunk.count || key >= walk.p.keys) return {R(1), R(0), R(0)};
      return {exp_of<T>(seqkern::load<R>(array_of(walk.p.decay), decay[i] + key)),
              walk.element(walk.p.k, of_k, i, key) * walk.shared.factors.k_norm[i],
              walk.element(walk.rows_of(reader), of_x, i, key) * walk.shared.norm[i]};
    }
  };

  // [dq] [de] of a reader, forward: k[j] is k_j as token i reads it.
  __device__ __forceinline__ void read_pairs(Reader reader, int key) {
    const TokensOfKey tokens(*this, reader, key);
    R k[kC] = {}, read = R(1);
    Token next = tokens[0];
#pragma unroll 1
    for (int i = 0; i < kC; ++i) {
      const Token token = next;
      next = tokens[i + 1];
      read *= token.a;
      R sum = read * shared.z[i][key];
#pragma unroll
      for (int j = 0; j < kC; ++j) {
        k[j] = j == i ? token.k : k[j] * token.a;
        sum = fma(shared.scores[i][j], k[j], sum);
      }
      const R dot = token.x * sum, weight = shared.weight[i], of_warp = warp_sum(dot);
      if (key % kWarpSize == 0) shared.read_parts[key / kWarpSize][i] = of_warp;
      shared.decays[i][key] = fma(weight, dot, reader == kQuery ? R(0) : shared.decays[i][key]);
      shared.z[i][key] = weight * shared.norm[i] * sum;
    }
  }
  // What it gives to [dk], backward: x[i] is x_i as it reads token j.
  __device__ __forceinline__ void carry_pairs(Reader reader, int key) {
    const TokensOfKey tokens(*this, reader, key);
    R x[kC] = {};
    Token next = tokens[kC - 1];
#pragma unroll 1
    for (int j = kC - 1; j >= 0; --j) {
      const Token token = next;
      next = tokens[j - 1];
      const R own = shared.weight[j] * token.x;
      R sum = R(0);
#pragma unroll
      for (int i = 0; i < kC; ++i) {
        if (i == j) x[i] = own;
        sum = fma(shared.scores[i][j], x[i], sum);
        x[i] *= token.a;
      }
      shared.decays[j][key] -= token.k * sum;
      shared.z[j][key] = shared.factors.k_norm[j] * sum;
    }
  }
  // The inter part of [dk]
  __device__ __forceinline__ void carry(int key) {
    const TokensOfKey tokens(*this, kWriter, key);
    R carry = R(1);
#pragma unroll 2
    for (int j = kC - 1; j >= 0; --j) {
      shared.z[j][key] *= carry * shared.factors.k_norm[j];
      carry *= tokens[j].a;
    }
  }
};

}  // namespace seqkern::delta_rule::cuda

// The last kernel of the backward where a head has one decay per token, or none.
#pragma once

#include "delta_rule/bwd_tokens.cuh"

namespace seqkern::delta_rule::cuda {

template <typename T, int kC, int kK, int kV>
struct TokenTiles : TokensTiles<T, kC, kK, kV> {
  Matrix<T, kC, kK> k, x;    // x: q, or e
  Matrix<T, kC, kC> scores;  // gradients of P or A, with the decays between tokens
};
template <typename T, int kC, int kK, int kV>
struct TokenShared : TokensShared<TokenTiles<T, kC, kK, kV>, T, kC, kK> {
  using R = Accumulator<T>;
  using Pairs = BlockProduct<T, kC, kC, kBwdWarps>;

  R row_sums[kC / Pairs::kColumns][kC], column_sums[kC / Pairs::kRows][kC];
  R columns[kC];  // sums over i of P_ij dP_ij + A_ij dA_ij
  R carried[kC];  // k_j . (inter part of dk_j)
};

template <typename T, int kC, int kK, int kV>
struct TokenDecays : TokensBase<TokenDecays<T, kC, kK, kV>, T, kC, kK, kV, TokenShared<T, kC, kK, kV>> {
  using Base = TokensBase<TokenDecays<T, kC, kK, kV>, T, kC, kK, kV, TokenShared<T, kC, kK, kV>>;
  using Base::Base, Base::p, Base::shared, Base::rows, Base::dk, Base::work;
  using typename Base::Keys, typename Base::Pairs, typename Base::R;

  __device__ __forceinline__ void begin() { load(shared.k, p.k); }

  __device__ __forceinline__ void take(Reader reader, Keys& z, Pairs& s) {
    const auto& x = reader == kWriter ? shared.k : shared.x;
    const R* const decays = reader == kWriter ? shared.factors.carry : shared.factors.read;
    if (reader != kWriter) {
      load(shared.x, this->rows_of(reader));
      commit_copies(), wait_copies<0>();
      pairs(reader, s);
    }
    __syncthreads();
    z.for_each([&](int i, int, R& sum) { sum *= decays[i] * shared.norm[i]; });
    sum_rows(z, shared.row_dots, [&](int i, int key, R value) { return value * to<R>(x[i][key]); });
    if (reader != kWriter) {  // [dq] [de] [dk]
      z.for_each([&](int i, int, R& sum) { sum *= shared.weight[i]; });
      z.template add<kPlain, kPlain>(shared.scores, shared.k, 0, kC, this->exact());
      dk.template add<kTransposed, kPlain>(shared.scores, shared.x, 0, kC, this->exact());
    }
    this->add(reader, z);
    __syncthreads();
    this->for_each_token([&](int i) {
      const R inter = sum_parts(shared.row_dots, i);
      if (reader == kWriter) {
        shared.carried[i] = inter;
        return;
      }
      shared.reads[reader][i] = inter + sum_parts(shared.row_sums, i);
      shared.columns[i] = (reader == kQuery ? R(0) : shared.columns[i]) + sum_parts(shared.column_sums, i);
    });
  }

  // [ddecay], by the first warp
  __device__ __forceinline__ void write_decays() {
    if (this->warp() != 0) return;
    constexpr unsigned kAll = 0xffffffffu;
    const int i = threadIdx.x;
    R dot = R(0);
#pragma unroll
    for (int key = i; key < kK; key += kWarpSize) dot += shared.states_dot[key];
    dot = warp_sum(dot) * shared.factors.total;
    R later = R(0), before = R(0);  // and this token
    if (i < kC) {
      later = static_cast<R>(p.scale) * shared.reads[kQuery][i] - shared.factors.beta[i] * shared.reads[kErase][i];
      later -= shared.columns[i], before = shared.carried[i];
    }
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const R from_later = __shfl_down_sync(kAll, later, distance),
              from_before = __shfl_up_sync(kAll, before, distance);
      if (i + distance < kWarpSize) later += from_later;
      if (i >= distance) before += from_before;
    }
    before = __shfl_up_sync(kAll, before, 1);
    if (i >= work().at.chunk.count) return;
    const R g = seqkern::load<R>(array_of(p.decay), rows(p.decay, work().hv)[i]);
    const R dg = later + (i == 0 ? R(0) : before) + dot;
    store(array_of(p.ddecay), rows(p.ddecay, work().hv)[i], g <= kVanished<R> ? dg * R(0) : dg);  // NaN stays
  }

 private:
  __device__ __forceinline__ void load(Matrix<T, kC, kK>& to_matrix, const Data& x) {
    load_tokens<kBwdThreads, 1>(to_matrix, x, rows(x, work().h), work().at.chunk.count, 0, p.keys);
  }

  // [dscores] of s_ij, and the sums over tokens that [ddecay] and [dbeta] take.
  __device__ __forceinline__ void pairs(Reader reader, Pairs& s) {
    if (!Pairs::has_part()) return;
    const T* const P = this->scores.record(work().slot, work().hv).P[0];
    const R* const A = this->scores.A(work().slot, work().hv);
    const auto& factors = shared.factors;
    Pairs both;
    for_each_of(
        [&](int i, int j, R& of_both, R& sum) {
          const bool reads = j < i || (j == i && reader == kQuery);
          const R score = reader == kQuery ? to<R>(seqkern::load(P + i * kC + j)) : seqkern::load(A + i * kC + j);
          of_both = j < i ? score * sum : R(0);
          const R factor = shared.weight[i] * shared.norm[i] * factors.k_norm[j];
          sum = reads ? factor * exp_of<T>(factors.c[i] - factors.c[j]) * sum : R(0);
        },
        both, s);
    s.store(shared.scores);
    sum_rows(both, shared.row_sums, [](int, int, R value) { return value; });
    sum_columns(both, shared.column_sums, [&](int i, int, R value) { return shared.weight[i] * value; });
  }
};

}  // namespace seqkern::delta_rule::cuda

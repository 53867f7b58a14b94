// Chunks of the backward where a head has one decay per token, or none.
#pragma once

#include "linear_attention/bwd_base.cuh"

namespace seqkern::linear_attention::cuda {

template <typename T, int kC, int kK, int kV>
struct TokenShared : WalkShared<T, kC, kK, kV> {
  using R = Accumulator<T>;
  using Cut = Products<T, kC, kK, kV>;

  Matrix<T, kC, kC> dP;  // w_j dP_ij exp(r_i - c_j)
  TokenGates<R, kC> gates;
  R to_end[kC];                         // exp(c_C - c_j)
  R before[kC];                         // sums of k_j . (inter part of dk_j) of earlier tokens
  R row_sums[Cut::columns(kC)][kC];     // sums of P_ij dP_ij, j < i
  R column_sums[Cut::kTokenWarps][kC];  // likewise, without w_j
  R q_sums[Cut::columns(kK)][kC];       // q_i . (inter part of dq_i)
  R k_sums[Cut::columns(kK)][kC];       // k_j . (inter part of dk_j) / w_j
};

template <typename T, int kC, int kK, int kV>
struct TokenDecays : WalkBase<T, kC, kK, kV, TokenShared<T, kC, kK, kV>> {
  using Base = WalkBase<T, kC, kK, kV, TokenShared<T, kC, kK, kV>>;
  using Base::Base, Base::p, Base::plan, Base::shared, Base::place, Base::exact, Base::keys, Base::kAtOnce;
  using Shared = TokenShared<T, kC, kK, kV>;
  using typename Base::Cut, typename Base::R, typename Base::State;
  static constexpr int kTokens = kC, kRounds = (kC + kWarpSize - 1) / kWarpSize;

  __device__ __forceinline__ void load_decays(const Chunk& chunk, bool first) {
    if (this->warp() == 0)
      take_gates<T>(shared.gates, p, place.stretch.b, place.hv, chunk, this->m_before(chunk, first));
  }
  __device__ __forceinline__ R total(int) const { return shared.gates.total; }
  // q_i to exp(r_i) * q_i, k_j to w_j exp(c_C - c_j) * k_j
  __device__ __forceinline__ void scale(bool queries, bool keys_too) {
    constexpr int kGroups = kK / kAtOnce;
#pragma unroll 1
    for (int at = queries ? threadIdx.x : threadIdx.x + kC * kGroups; at < (keys_too ? 2 : 1) * kC * kGroups;
         at += kBwdThreads) {
      const bool key = at >= kC * kGroups;
      const int i = at / kGroups - (key ? kC : 0);
      const R factor = key ? shared.gates.carry[i] : shared.gates.read[i];
      auto& x = *reinterpret_cast<Vector<T, kAtOnce>*>(&(key ? shared.k : shared.q)[i][at % kGroups * kAtOnce]);
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) x[e] = to<T>(factor * to<R>(x[e]));
    }
  }

  __device__ __forceinline__ void process(State& dS, const Chunk& chunk) {
    scores(dS);
#pragma unroll 1
    for (int which = 0; which < 2; ++which) {
      key_gradient(which == 1, chunk);
      __syncthreads();
      if (which == 0) dS.store(shared.state);
      __syncthreads();
    }
    if (!p.bonus) return;
    this->for_each_key([&](int key) {
      for (int i = 0; i < chunk.count; ++i) {
        this->dbonus = fma(shared.diagonal[i], to<R>(shared.q[i][key]) * to<R>(shared.k[i][key]), this->dbonus);
      }
    });
    __syncthreads();
  }

  // [scores] [dscores], their sums for [ddecay] and [dweight], and dS . S + dz . z
  __device__ __forceinline__ void scores(State& dS) {
    using Tokens = typename Cut::Tokens;
    const bool previous = p.read_previous;
    const TokenGates<R, kC>& gates = shared.gates;
    if (Tokens::has_part()) {
      Tokens P, dP, both;
      P.clear(), dP.clear();
      P.template add<kPlain, kTransposed>(shared.q, shared.k, 0, keys, exact);
      dP.template add<kPlain, kTransposed>(shared.dn, shared.v, 0, kV, exact);
      for_each_of(
          [&](int i, int j, R& of_P, R& of_dP, R& of_both) {
            const bool reads = j < i || (j == i && !previous);
            const R given = of_dP + shared.de[i], w = gates.weight[j];
            const R decay = reads ? gates.template decay<T>(i, j, previous) : R(0);
            of_P = reads ? of_P * decay : R(0);
            of_dP = reads ? given : R(0);
            of_both = of_P * of_dP;
            of_P *= w, of_dP *= decay * w;
            if (i == j) shared.diagonal[i] = previous ? given : of_both;
            if (i == j && previous) of_P = p.bonus ? shared.bonus_read[i] : R(0);
          },
          P, dP, both);
      P.store(shared.P), dP.store(shared.dP);
      sum_rows(both, shared.row_sums, [&](int i, int j, R x) { return j < i ? x * gates.weight[j] : R(0); });
      sum_columns(both, shared.column_sums, [&](int i, int j, R x) { return j < i ? x : R(0); });
    }
    R dot = R(0);
    dS.for_each([&](int key, int v, R& s) { dot = fma(s, to<R>(shared.state[key][v]), dot); });
    if (this->normalized()) this->for_each_key([&](int key) { dot = fma(shared.dz[key], shared.z[key], dot); });
    dot = warp_sum(dot);
    if (threadIdx.x % kWarpSize == 0) shared.warp_sums[this->warp()] = dot;
    if (threadIdx.x < kC) shared.to_end[threadIdx.x] = exp_of<T>(gates.c[kC - 1] - gates.c[threadIdx.x]);
    __syncthreads();
  }

  // [dq], or [dk] with dS in the place of S: the inter part, its sums for [ddecay], the intra part, and that of the
  // bonus.
  __device__ __forceinline__ void key_gradient(bool of_k, const Chunk& chunk) {
    typename Cut::Keys x;
    x.clear();
    x.template add<kPlain, kTransposed>(of_k ? shared.v : shared.dn, shared.state, 0, kV, exact);
    const R* const factor = of_k ? shared.to_end : shared.gates.read;
    const R* const sums = of_k ? shared.dz : shared.z;
    const auto& own = of_k ? shared.k : shared.q;
    const auto& other = of_k ? shared.q : shared.k;
    x.for_each([&](int i, int key, R& s) { s = fma(of_k ? R(1) : shared.de[i], sums[key], s) * factor[i]; });
    sum_rows(x, of_k ? shared.k_sums : shared.q_sums, [&](int i, int key, R s) { return s * to<R>(own[i][key]); });
    if (of_k) {
      x.for_each([&](int j, int, R& s) { s *= shared.gates.weight[j]; });
      x.template add<kTransposed, kPlain>(shared.dP, shared.q, 0, this->depth(chunk), exact);
    } else {
      x.template add<kPlain, kPlain>(shared.dP, shared.k, 0, this->depth(chunk), exact);
    }
    if (p.bonus) {
      x.for_each(
          [&](int i, int key, R& s) { s = fma(shared.diagonal[i], shared.bonus[key] * to<R>(other[i][key]), s); });
    }
    this->store_keys(x, of_k ? p.dk : p.dq, of_k ? plan.workspace.dk : plan.workspace.dq, chunk);
  }

  // --- one number per token, by the first warp
  // The gradient T_t of m_t, in the place of what is its own; what is left reaches m before the chunk [dgates].
  __device__ __forceinline__ void flow_maxima(const Chunk& chunk, bool first) {
    if (p.gates.form != Form::kExp || this->warp() != 0) return;
    constexpr unsigned kAll = 0xffffffffu;
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (int round = kRounds - 1; round >= 0; --round) {
      const int i = round * kWarpSize + lane;
      const bool exists = i < chunk.count;
      const R own = exists ? shared.dm[i] : R(0);
      bool flows = !exists || gate_at(chunk, first, i).kept;
      const bool here = flows;
      R sum = exists && flows ? own : R(0);
#pragma unroll
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const R later = __shfl_down_sync(kAll, sum, distance);
        const bool later_flows = __shfl_down_sync(kAll, static_cast<int>(flows), distance) != 0;
        if (lane + distance >= kWarpSize) continue;
        if (flows) sum += later;
        flows = flows && later_flows;
      }
      const R before = sum + (flows ? this->dm_later : R(0));
      const R after = __shfl_down_sync(kAll, before, 1);
      if (exists) shared.dm[i] = own + (lane + 1 < kWarpSize ? after : this->dm_later);
      this->dm_later = __shfl_sync(kAll, here ? before : R(0), 0);
      if (__shfl_sync(kAll, static_cast<int>(flows), 0) == 0) this->passes = R(0);
    }
    __syncwarp();
  }

  // Gate of token i [gate]; kept: m_t is f_t + m_{t-1}.
  struct TokenGate : Gate<R> {
    bool kept, empty;
  };
  __device__ __forceinline__ TokenGate gate_at(const Chunk& chunk, bool first, int i) const {
    const Rows input = this->rows(p.gates.input, chunk, place.hv);
    TokenGate x{load_gate<R>(p, this->rows(p.gates.decay, chunk, place.hv), input, place.hv, i, true), false, false};
    if (p.gates.form != Form::kExp) return x;
    const R before = i > 0 ? shared.gates.maximum[i - 1] : this->m_before(chunk, first), m = shared.gates.maximum[i];
    x.empty = m == -kInfinity<R>;
    x.kept = !x.empty && !(x.input > x.f + before);
    x.g = x.empty ? kVanished<R> : clamp_decay(x.f + before - m), x.w = shared.gates.weight[i];
    return x;
  }

  // [ddecay] [dweight] [dgates]
  __device__ __forceinline__ void write_gates(const Chunk& chunk, bool first) {
    if (p.gates.form == Form::kNone || this->warp() != 0) return;
    constexpr unsigned kAll = 0xffffffffu;
    const int lane = threadIdx.x % kWarpSize;
    const R* const w = shared.gates.weight;
    R dot = R(0);
#pragma unroll
    for (int warp = 0; warp < Cut::kWarps; ++warp) dot += shared.warp_sums[warp];
    dot *= shared.gates.total;
    R sum = R(0);
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      const int i = round * kWarpSize + lane;
      R own = i < kC ? w[i] * sum_parts(shared.k_sums, i) : R(0);
#pragma unroll
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const R other = __shfl_up_sync(kAll, own, distance);
        if (lane >= distance) own += other;
      }
      const R other = __shfl_up_sync(kAll, own, 1);
      if (i < kC) shared.before[i] = lane == 0 ? sum : sum + other;
      sum += __shfl_sync(kAll, own, kWarpSize - 1);
    }
    R later = R(0);
#pragma unroll 1
    for (int round = kRounds - 1; round >= 0; --round) {
      const int i = round * kWarpSize + lane, row = p.read_previous ? i + 1 : i;
      R own = row < kC ? sum_parts(shared.row_sums, row) + sum_parts(shared.q_sums, row) : R(0);
      if (i < kC) own -= w[i] * sum_parts(shared.column_sums, i);
#pragma unroll
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const R other = __shfl_down_sync(kAll, own, distance);
        if (lane + distance < kWarpSize) own += other;
      }
      if (i < chunk.count) {
        const R dw = sum_parts(shared.column_sums, i) + (p.read_previous ? R(0) : shared.diagonal[i]) +
                     sum_parts(shared.k_sums, i);
        dgate(chunk, first, i, own + later + shared.before[i] + dot, dw);
      }
      later += __shfl_sync(kAll, own, 0);
    }
  }
  __device__ __forceinline__ void dgate(const Chunk& chunk, bool first, int i, R dg, R dw) {
    const TokenGate x = gate_at(chunk, first, i);
    if (x.g <= kVanished<R>) dg *= R(0);  // NaN stays
    R given = dg;
    if (p.gates.form == Form::kDelta) {
      this->dA = fma(dg, x.w, this->dA);
      const bool inside = x.delta >= R(p.gates.low) && x.delta <= R(p.gates.high);
      given = inside ? fma(load<R>(p.gates.A, place.hv), dg, dw) : R(0);
      if (p.gates.softplus) given *= -expm1(-x.delta);
      this->dbias += given;
    } else if (p.gates.form == Form::kExp) {
      const R dm = shared.dm[i];
      given = x.empty ? R(0) : (dg + (x.kept ? dm : R(0))) * -expm1(x.f);
      this->store_gate(p.dinput, plan.workspace.dinput, chunk, i, 1, 0,
                       x.empty ? R(0) : x.w * dw + (x.kept ? R(0) : dm));
    }
    if (is_constant(p))
      this->ddecay += given;
    else
      this->store_gate(p.ddecay, plan.workspace.ddecay, chunk, i, 1, 0, given);
  }
};

}  // namespace seqkern::linear_attention::cuda

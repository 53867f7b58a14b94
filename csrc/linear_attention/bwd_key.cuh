// Chunks of the backward where every key has a decay of its own. Within a chunk, pairs of tokens are taken one by one,
// a thread for each key: what token j holds decays as the thread goes from token to token, so that no factor exceeds 1.
#pragma once

#include "linear_attention/bwd_base.cuh"

namespace seqkern::linear_attention::cuda {

template <typename T, int kC, int kK, int kV>
struct KeyShared : WalkShared<T, kC, kK, kV> {
  using R = Accumulator<T>;
  using Cut = Products<T, kC, kK, kV>;

  Matrix<R, kC, kK> read, carry;  // exp(g_t), then exp(r_i); exp(c_C - c_j), then k_j * (inter part of dk_j)
  Matrix<R, kC, kK> dq, dk;       // intra parts; then q_i * dq_i and k_j * (intra part of dk_j)
  R dP[kC][kC];                   // dP_ij of the tokens that i reads
  R scores[kK / kWarpSize][kC][kC];
  R dots[Cut::kValueWarps][kK];  // sums over values of dS * S
  R total[kK];
};

template <typename T, int kC, int kK, int kV>
struct KeyDecays : WalkBase<T, kC, kK, kV, KeyShared<T, kC, kK, kV>> {
  using Base = WalkBase<T, kC, kK, kV, KeyShared<T, kC, kK, kV>>;
  using Base::Base, Base::p, Base::plan, Base::shared, Base::place, Base::exact, Base::keys;
  using Shared = KeyShared<T, kC, kK, kV>;
  using typename Base::Cut, typename Base::R, typename Base::State;
  static constexpr int kTokens = kC, kGroups = kBwdThreads / kK;
  static_assert(kC == 16);

  __device__ __forceinline__ R total(int key) const { return shared.total[key]; }
  __device__ __forceinline__ void flow_maxima(const Chunk&, bool) {}

  // exp(g) of a thread's key [gate], and the products of them.
  __device__ __forceinline__ void load_decays(const Chunk& chunk, bool) {
    const Rows rows = this->rows(p.gates.decay, chunk, place.hv);
    this->for_each_key([&](int key) {
      R read = R(1);
#pragma unroll 1
      for (int i = 0; i < kC; ++i) {
        const R a = i < chunk.count && key < p.keys ? exp_of<T>(load<R>(array_of(p.gates.decay), rows[i] + key)) : R(1);
        shared.read[i][key] = a, read *= a;
      }
      shared.total[key] = read;
    });
  }
  // q_i to exp(r_i) * q_i, k_j to exp(c_C - c_j) * k_j; a walk backward has done so.
  __device__ __forceinline__ void scale(bool queries, bool keys_too) {
    if (queries && keys_too) return;
    this->for_each_key([&](int key) {
      R factor = R(1);
#pragma unroll 1
      for (int n = 0; n < kC; ++n) {
        const int i = queries ? n : kC - 1 - n;
        T& x = (queries ? shared.q : shared.k)[i][key];
        const R next = factor * shared.read[i][key];
        x = to<T>((queries && !p.read_previous ? next : factor) * to<R>(x));
        factor = next;
      }
    });
  }

  __device__ __forceinline__ void process(State& dS, const Chunk& chunk) {
    scores(dS);
    pairs();
    finish_scores();
    dq(chunk);
    __syncthreads();
    dS.store(shared.state);
    __syncthreads();
    dk(chunk);
    __syncthreads();
  }

  // [dscores], and dS * S
  __device__ __forceinline__ void scores(State& dS) {
    using Tokens = typename Cut::Tokens;
    if (Tokens::has_part()) {
      Tokens dP;
      dP.clear();
      dP.template add<kPlain, kTransposed>(shared.dn, shared.v, 0, kV, exact);
      dP.for_each([&](int i, int j, R& sum) {
        const R given = sum + shared.de[i];
        shared.dP[i][j] = j < i || (j == i && !p.read_previous) ? given : R(0);
        if (i == j) shared.diagonal[i] = given;
      });
    }
    sum_rows(dS, shared.dots, [&](int key, int v, R s) { return s * to<R>(shared.state[key][v]); });
    __syncthreads();
  }

  // The intra parts of dq and dk and the scores; then the decays from and to the chunk's ends.
  __device__ __forceinline__ void pairs() {
    const int key = threadIdx.x % kK, group = threadIdx.x / kK;
    if (group == 0) read_pairs(key);
    if (group == kGroups - 1) carry_pairs(key);
    __syncthreads();
    this->for_each_key([&](int key) {
      R carry = R(1), read = R(1);
#pragma unroll 1
      for (int j = kC - 1; j >= 0; --j) shared.carry[j][key] = carry, carry *= shared.read[j][key];
#pragma unroll 1
      for (int i = 0; i < kC; ++i) {
        const R before = read;
        read *= shared.read[i][key];
        shared.read[i][key] = p.read_previous ? before : read;
      }
    });
  }
  // Forward: x_j is k_j as token i reads it.
  __device__ __forceinline__ void read_pairs(int key) {
    const int lane = threadIdx.x % kWarpSize;
    R x[kC] = {};
#pragma unroll 1
    for (int i = 0; i < kC; ++i) {
      const R q = to<R>(shared.q[i][key]), k = to<R>(shared.k[i][key]), a = shared.read[i][key];
      R sum = R(0), score[kC];
#pragma unroll
      for (int j = 0; j < kC; ++j) {
        const R next = j == i ? k : x[j] * a, read = p.read_previous ? x[j] : next;
        x[j] = next;
        sum = fma(shared.dP[i][j], read, sum), score[j] = q * read;
      }
      halving_sum<16, 1>(score);
      if (lane % 2 == 0) shared.scores[key / kWarpSize][i][lane / 2] = score[0];
      shared.dq[i][key] = sum;
      if (p.bonus) this->dbonus = fma(shared.diagonal[i], q * k, this->dbonus);
    }
  }
  // Backward: y_i is q_i as it reads token j.
  __device__ __forceinline__ void carry_pairs(int key) {
    R y[kC] = {};
#pragma unroll 1
    for (int j = kC - 1; j >= 0; --j) {
      const R q = to<R>(shared.q[j][key]), a = shared.read[j][key];
      R sum = R(0);
#pragma unroll
      for (int i = 0; i < kC; ++i) {
        if (i == j && !p.read_previous) y[i] = q;
        sum = fma(shared.dP[i][j], y[i], sum);
        y[i] = i == j && p.read_previous ? q : y[i] * a;
      }
      shared.dk[j][key] = sum;
    }
  }
  // [scores]
  __device__ __forceinline__ void finish_scores() {
    for (int at = threadIdx.x; at < kC * kC; at += kBwdThreads) {
      const int i = at / kC, j = at % kC;
      R sum = R(0);
#pragma unroll
      for (int part = 0; part < kK / kWarpSize; ++part) sum += shared.scores[part][i][j];
      if (j > i) sum = R(0);
      if (i == j && p.read_previous) sum = p.bonus ? shared.bonus_read[i] : R(0);
      shared.P[i][j] = to<T>(sum);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void dq(const Chunk& chunk) {  // [dq]
    typename Cut::Keys x;
    x.clear();
    x.template add<kPlain, kTransposed>(shared.dn, shared.state, 0, kV, exact);
    x.for_each([&](int i, int key, R& s) {
      s = fma(fma(shared.de[i], shared.z[key], s), shared.read[i][key], shared.dq[i][key]);
      shared.dq[i][key] = to<R>(shared.q[i][key]) * s;
      if (p.bonus) s = fma(shared.diagonal[i], shared.bonus[key] * to<R>(shared.k[i][key]), s);
    });
    this->store_keys(x, p.dq, plan.workspace.dq, chunk);
  }
  // [dk]; then q and k are scaled, for [dv] and [dcarry]
  __device__ __forceinline__ void dk(const Chunk& chunk) {
    typename Cut::Keys x;
    x.clear();
    x.template add<kPlain, kTransposed>(shared.v, shared.state, 0, kV, exact);
    x.for_each([&](int j, int key, R& s) {
      const R carry = shared.carry[j][key], intra = shared.dk[j][key], q = to<R>(shared.q[j][key]),
              k = to<R>(shared.k[j][key]);
      const R inter = (s + shared.dz[key]) * carry;
      shared.dk[j][key] = k * intra, shared.carry[j][key] = k * inter;
      s = inter + intra;
      if (p.bonus) s = fma(shared.diagonal[j], shared.bonus[key] * q, s);
      shared.q[j][key] = to<T>(q * shared.read[j][key]), shared.k[j][key] = to<T>(k * carry);
    });
    this->store_keys(x, p.dk, plan.workspace.dk, chunk);
  }

  // [ddecay]
  __device__ __forceinline__ void write_gates(const Chunk& chunk, bool) {
    const Rows decay = this->rows(p.gates.decay, chunk, place.hv);
    this->for_each_key([&](int key) {
      if (key >= p.keys) return;
      R before = sum_parts(shared.dots, key);
      before = (before + (this->normalized() ? shared.dz[key] * shared.z[key] : R(0))) * shared.total[key];
#pragma unroll 1
      for (int t = 0; t < chunk.count; ++t) {  // and what earlier tokens have sent to the chunk's end
        const R own = shared.carry[t][key];
        shared.carry[t][key] = before, before += own;
      }
      R later = R(0);
#pragma unroll 1
      for (int t = chunk.count - 1; t >= 0; --t) {
        if (!p.read_previous) later += shared.dq[t][key];
        later -= shared.dk[t][key];
        const R g = load<R>(array_of(p.gates.decay), decay[t] + key);
        const R dg = (later + shared.carry[t][key]) * (g <= kVanished<R> ? R(0) : R(1));  // NaN stays
        this->store_gate(p.ddecay, plan.workspace.ddecay, chunk, t, p.keys, key, dg);
        if (p.read_previous) later += shared.dq[t][key];
      }
    });
  }
};

}  // namespace seqkern::linear_attention::cuda

// A block of the forward: its shared memory, and what it does with a state and with a chunk.
#pragma once

#include "linear_attention/chunk.cuh"
#include "linear_attention/tile.h"

namespace seqkern::linear_attention::cuda {

constexpr int kFwdWarps = kFwdThreads / kWarpSize;

// What a block does.
struct FwdWork {
  Stretch stretch;
  int64_t head, key_head;
  int64_t segment;
  int64_t element;  // in the workspace: of the first segment of this row
};

template <typename T, int kTokens, int kKeys, int kValues, bool kPerKey>
struct FwdTiles {
  using R = Accumulator<T>;
  Matrix<T, kTokens, kKeys> q, k;
  Matrix<T, kTokens, kValues> v;
  Matrix<T, kTokens, kTokens> scores;  // [scores]
  Matrix<T, kKeys, kValues> state;     // S as an operand
  Matrix<R, kPerKey ? kTokens : 1, kPerKey ? kKeys : 1> decays;
};

template <typename T, int kTokens, int kKeys, int kValues, bool kPerKey>
struct FwdShared : FwdTiles<T, kTokens, kKeys, kValues, kPerKey> {
  using R = Accumulator<T>;
  TokenGates<R, kTokens> gates;
  R diagonal[kTokens];     // of the scores, with read_previous
  R denominator[kTokens];  // d_t
  R z[kKeys], skip[kValues];
  R m, forget;   // m_t; the sum of f since the start of the segment
  FwdWork work;  // here it costs no registers
};

// What a segment does to a state that enters it, in the workspace: S and z from zero; the product of the decays, per
// key; m from an empty state; the sum of f.
template <typename R>
struct FwdElement {
  R *S, *z, *decay, *m, *forget;

  __device__ __forceinline__ FwdElement(void* workspace, int64_t index, int64_t numbers, int keys) {
    z = static_cast<R*>(workspace) + index * numbers, decay = z + keys, m = decay + keys, forget = m + 1, S = m + 4;
  }
};

template <typename T, int kTokens, int kKeys, int kValues, bool kPerKey>
struct FwdWalk {
  using R = Accumulator<T>;
  using Scores = BlockProduct<T, kTokens, kTokens, kFwdWarps>;
  using Outputs = BlockProduct<T, kTokens, kValues, kFwdWarps>;
  using States = BlockProduct<T, kKeys, kValues, kFwdWarps>;

  const FwdParams& p;
  FwdShared<T, kTokens, kKeys, kValues, kPerKey>& shared;
  const int column;  // the first value
  States S;
  R decay;  // since the start of the segment: the product of the decays of key threadIdx.x

  __device__ __forceinline__ bool normalized() const { return p.normalizer != Normalizer::kNone; }
  __device__ __forceinline__ const FwdWork& work() const { return shared.work; }
  // Products of fp16 data are exact in tf32.
  __device__ __forceinline__ bool exact() const { return p.q.dtype != DType::kFloat16; }
  // Of products over keys.
  __device__ __forceinline__ int depth() const {
    return static_cast<int>(p.keys + kDepthStep<T> - 1) / kDepthStep<T> * kDepthStep<T>;
  }

  template <typename F>
  __device__ __forceinline__ void for_each_key(F&& f) {
    static_assert(kKeys <= kFwdThreads, "a thread for every key");
    if (threadIdx.x < kKeys) f(static_cast<int>(threadIdx.x));
  }
  __device__ __forceinline__ void store_operand() { S.store(shared.state); }

  __device__ __forceinline__ void set_maximum(R m) {
    if (threadIdx.x == 0) shared.m = m;
    __syncwarp();  // that computes the gates
  }

  // The state becomes zero.
  __device__ __forceinline__ void clear() {
    S.clear();
    store_operand();
    for_each_key([&](int k) { shared.z[k] = R(0); });
    set_maximum(-kInfinity<R>);
  }

  // The state of a row, if there is one.
  __device__ __forceinline__ void enter() {
    const State& state = p.initial_state;
    const int64_t row = work().stretch.state, head = work().head, of_head = row * p.value_heads + head;
    const R m = state.m ? load<R>(state.m, of_head) : -kInfinity<R>;
    const bool empty = p.gates.form == Form::kExp && m == -kInfinity<R>;  // whatever it holds
    if (empty || !state.S) {
      S.clear();
    } else {
      load_state<kFwdThreads>(S, by_way(), state.S, state_shape(p), row, head, column);
    }
    for_each_key(
        [&](int k) { shared.z[k] = !empty && state.z && k < p.keys ? load<R>(state.z, of_head * p.keys + k) : R(0); });
    store_operand();
    set_maximum(m);
  }

  __device__ __forceinline__ void leave() {
    const State& state = p.final_state;
    const int64_t row = work().stretch.state, head = work().head, of_head = row * p.value_heads + head;
    if (column == 0) {
      for_each_key([&](int k) {
        if (state.z && k < p.keys) store(static_cast<R*>(state.z.data) + of_head * p.keys + k, shared.z[k]);
      });
      if (state.m && threadIdx.x == 0) store(static_cast<R*>(state.m.data) + of_head, shared.m);
    }
    if (state.S) store_state<kFwdThreads>(S, by_way(), state.S, state_shape(p), row, head, column);
  }

  // The place of a chunk's tiles, for a state on its way.
  __device__ __forceinline__ Matrix<R, kKeys, kValues>& by_way() {
    static_assert(sizeof(Matrix<R, kKeys, kValues>) <= sizeof(FwdTiles<T, kTokens, kKeys, kValues, kPerKey>));
    return shared_memory<Matrix<R, kKeys, kValues>>();
  }

  // The state goes through a segment that another block has summarized.
  __device__ __forceinline__ void fold(const FwdElement<R>& x) {
    const bool is_exp = p.gates.form == Form::kExp;
    R of_state = R(1), own = R(1);
    if (is_exp) {
      __syncthreads();
      const R kept = shared.m + load(x.forget), entered = load(x.m), m = max(kept, entered);
      __syncthreads();
      set_maximum(m);
      const bool empty = m == -kInfinity<R>;
      of_state = empty ? R(0) : exp_of<T>(kept - m), own = empty ? R(0) : exp_of<T>(entered - m);
    }
    const auto folded = [&](R state, const R* from, int k) {
      return (is_exp ? of_state : load(x.decay + k)) * state + own * load(from);
    };
    int i = 0;
    S.for_each([&](int k, int, R& s) {
      if (i % 8 == 0) __syncwarp();  // bounds the loads on their way, and so the registers
      s = folded(s, x.S + i++ * kFwdThreads + threadIdx.x, k);
    });
    for_each_key([&](int k) { shared.z[k] = folded(shared.z[k], x.z + k, k); });
    store_operand();
  }

  __device__ __forceinline__ void store_element(const FwdElement<R>& x) {
    R* to_S = x.S + threadIdx.x;
    S.for_each([&](int, int, R& s) { store(to_S, s), to_S += kFwdThreads; });
    for_each_key([&](int k) { store(x.z + k, shared.z[k]), store(x.decay + k, decay); });
    if (threadIdx.x == 0) store(x.m, shared.m), store(x.forget, shared.forget);
  }

  __device__ __forceinline__ Rows rows(const Data& x, const Chunk& chunk, int64_t h) const {
    return Rows(x, p.sequences, work().stretch.b, chunk.begin, h);
  }

  __device__ __forceinline__ void fetch(const Chunk& chunk) {
    const int64_t h = work().key_head;
    load_tokens<kFwdThreads>(shared.q, p.q, rows(p.q, chunk, h), chunk.count, 0, p.keys);
    load_tokens<kFwdThreads>(shared.k, p.k, rows(p.k, chunk, h), chunk.count, 0, p.keys);
    load_tokens<kFwdThreads>(shared.v, p.v, rows(p.v, chunk, work().head), chunk.count, column, p.size);
    commit_copies();
    if (threadIdx.x < kWarpSize) take_gates<T>(shared.gates, p, work().stretch.b, work().head, chunk, shared.m);
    if constexpr (kPerKey) {
      const Rows from = rows(p.gates.decay, chunk, work().head);
      load_key_decays<kFwdThreads, T>(shared.decays, p.gates.decay, from, chunk.count, 0, p.keys);
    }
    wait_copies<0>();
    __syncthreads();
  }

  // [scores]; without a decay per key q is left as it is, else it becomes exp(r_i) * q_i, and k exp(c_C - c_j) * k_j.
  __device__ __forceinline__ Scores scores() {
    Scores P;
    P.clear();
    if (p.bonus) {
      bonus_diagonal();
      __syncthreads();
    }
    P.template add<kPlain, kTransposed>(shared.q, shared.k, 0, depth(), exact());
    if constexpr (kPerKey) {
      P.for_each([](int i, int j, R& sum) { sum = i == j ? sum : R(0); });
      __syncthreads();
      key_scores<kFwdThreads>(shared.k, shared.decays, depth(), !p.read_previous, exact(), KeyReader{P, shared.q});
    } else {
      const TokenGates<R, kTokens>& gates = shared.gates;
      P.for_each([&](int i, int j, R& sum) {
        const bool seen = j < i || (j == i && !p.read_previous);
        sum = seen ? gates.weight[j] * gates.template decay<T>(i, j, p.read_previous) * sum : R(0);
      });
    }
    if (p.read_previous) {
      P.for_each([&](int i, int j, R& sum) {
        if (i == j) sum = p.bonus ? shared.diagonal[i] : R(0);
      });
    }
    return P;
  }

  // q_i . (bonus * k_i)
  __device__ __forceinline__ void bonus_diagonal() {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t of_head = work().key_head * p.keys;
#pragma unroll 1
    for (int i = threadIdx.x / kWarpSize; i < kTokens; i += kFwdWarps) {
      R sum = R(0);
#pragma unroll 1
      for (int k = lane; k < p.keys; k += kWarpSize) {
        sum += to<R>(shared.q[i][k]) * load<R>(p.bonus, of_head + k) * to<R>(shared.k[i][k]);
      }
      sum = warp_sum(sum);
      if (lane == 0) shared.diagonal[i] = sum;
    }
  }

  // [norm], from scores and z
  __device__ __forceinline__ void take_denominators(const Chunk& chunk) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (int i = threadIdx.x / kWarpSize; i < kTokens; i += kFwdWarps) {
      R sum = R(0), of_state = R(0);
#pragma unroll 1
      for (int j = lane; j <= i; j += kWarpSize) sum += to<R>(shared.scores[i][j]);
#pragma unroll 2
      for (int k = lane; k < p.keys; k += kWarpSize) of_state += to<R>(shared.q[i][k]) * shared.z[k];
      const R e = warp_sum(sum + shared.gates.read[i] * of_state), m_i = shared.gates.maximum[i];
      if (lane > 0) continue;
      const R scaled = static_cast<R>(p.scale) * e;
      shared.denominator[i] =
          static_cast<R>(p.eps) + (p.normalizer == Normalizer::kSum ? e : max(fabs(scaled), exp(-m_i)));
      if (column > 0 || i >= chunk.count) continue;
      const int64_t token = number(chunk, i);
      if (p.denominators) store(static_cast<R*>(p.denominators) + token, e);
      if (p.maxima) store(static_cast<R*>(p.maxima) + token, m_i);
    }
  }

  // Of token i, in a tensor (B, L, HV).
  __device__ __forceinline__ int64_t number(const Chunk& chunk, int i) const {
    const int64_t place = memory_place(p.sequences, chunk.begin + i);
    return (work().stretch.b * p.sequences.length + place) * p.value_heads + work().head;
  }

  // [chunk] [norm] [out] [skip]
  __device__ __forceinline__ void read(const Chunk& chunk) {
    {
      Scores P = scores();
      P.store(shared.scores);
    }
    Outputs o;
    o.clear();
    o.template add<kPlain, kPlain>(shared.q, shared.state, 0, depth(), exact());
    o.for_each([&](int i, int, R& sum) { sum *= shared.gates.read[i]; });
    __syncthreads();
    if (normalized()) {
      take_denominators(chunk);
      __syncthreads();
    }
    if (p.gate) load_gate_values(chunk);
    o.template add<kPlain, kPlain>(shared.scores, shared.v, 0, Outputs::first_row() + Outputs::kRows, exact());
    o.for_each([&](int i, int, R& sum) {
      sum *= static_cast<R>(p.scale);
      if (normalized()) sum /= shared.denominator[i];
    });
    if (p.o) store_values(o, p.o, chunk);
    if (p.skip) {
      o.for_each([&](int i, int v, R& sum) { sum += shared.skip[v] * to<R>(shared.v[i][v]); });
    }
    if (p.gate) {
      wait_copies<0>();
      __syncthreads();
      o.for_each([&](int i, int v, R& sum) { sum *= silu<T>(to<R>(shared.q[i][v])); });
    }
    store_values(o, p.y, chunk);
  }

  // The gate of [skip], in the place of q.
  __device__ __forceinline__ void load_gate_values(const Chunk& chunk) {
    const Rows from = rows(p.gate, chunk, work().head);
    if (p.gate.dtype == p.v.dtype) {
      load_tokens<kFwdThreads>(shared.q, p.gate, from, chunk.count, column, p.size);
      commit_copies();
      return;
    }
    for_each_output(chunk, [&](int i, int v) { shared.q[i][v] = load<T>(array_of(p.gate), from[i] + column + v); });
  }

  // f(token, value) for what exists.
  template <typename F>
  __device__ __forceinline__ void for_each_output(const Chunk& chunk, F&& f) {
#pragma unroll 1
    for (int at = threadIdx.x; at < chunk.count * kValues; at += kFwdThreads) {
      if (column + at % kValues < p.size) f(at / kValues, at % kValues);
    }
  }

  __device__ __forceinline__ void store_values(Outputs& values, const Data& x, const Chunk& chunk) {
    const Rows to_rows = rows(x, chunk, work().head);
    visit_data<T>(x, [&](auto* data) {
      const bool even = whole_pairs(data, to_rows);
      values.for_each_pair([&](int i, int v, R left, R right) {
        if (i < chunk.count) store_pair(data, to_rows[i] + column + v, p.size - column - v, even, left, right);
      });
    });
  }

  // [carry]
  __device__ __forceinline__ void advance() {
    __syncthreads();
    if constexpr (!kPerKey) {
#pragma unroll 4
      for (int at = threadIdx.x; at < kTokens * kValues; at += kFwdThreads) {
        T& v = shared.v[at / kValues][at % kValues];
        v = to<T>(shared.gates.carry[at / kValues] * to<R>(v));
      }
      __syncthreads();
    }
    const auto decay_of = [&](int k) {
      if constexpr (kPerKey)
        return shared.decays[0][k];
      else
        return shared.gates.total;
    };
    S.for_each([&](int k, int, R& s) { s *= decay_of(k); });
    S.template add<kTransposed, kPlain>(shared.k, shared.v, 0, kTokens, exact());
    store_operand();
    for_each_key([&](int k) {
      decay *= decay_of(k);
      if (!normalized()) return;
      R sum = decay_of(k) * shared.z[k];
#pragma unroll 4
      for (int j = 0; j < kTokens; ++j) sum += shared.gates.carry[j] * to<R>(shared.k[j][k]);
      shared.z[k] = sum;
    });
    if (threadIdx.x == 0) shared.m = shared.gates.last_maximum, shared.forget += shared.gates.forget;
    __syncthreads();
  }

  // Tokens of no sequence.
  __device__ __forceinline__ void pad(const Chunk& chunk) {
    const Rows of_y = rows(p.y, chunk, work().head), of_o = rows(p.o, chunk, work().head);
    for_each_output(chunk, [&](int i, int v) {
      store(array_of(p.y), of_y[i] + column + v, R(0));
      if (p.o) store(array_of(p.o), of_o[i] + column + v, R(0));
    });
    if (column > 0 || static_cast<int>(threadIdx.x) >= chunk.count) return;
    const int64_t token = number(chunk, threadIdx.x);
    if (p.denominators) store(static_cast<R*>(p.denominators) + token, R(0));
    if (p.maxima) store(static_cast<R*>(p.maxima) + token, R(0));
  }
};

}  // namespace seqkern::linear_attention::cuda

// The last kernel of the backward: from the state before a chunk, the gradient behind it, and w, all that its tokens
// get, for every chunk and key head by itself. Value heads of one key head are taken one after the other.
//
// Of a chunk three kinds of rows have to do with states: q and e read the one before it, with gradients dn and -b, and
// k writes to that behind it. `Reader` numbers them; what is done for one of them is done for all.
#pragma once

#include "common/matmul_sums.cuh"
#include "delta_rule/bwd.cuh"

namespace seqkern::delta_rule::cuda {

enum Reader { kQuery, kErase, kWriter };

// What a block works on.
struct TokensWork {
  SlotChunk at;
  bool first, last;  // chunk of its sequence
  int64_t slot, h;
  int64_t hv, end_hv;  // the value head at present, and the last one's successor
};

template <typename T, int kC, int kK, int kV>
struct TokensTiles {
  Matrix<T, kK, kV> state;      // S, or dS
  Matrix<T, kC, kV> values, u;  // values: dO, w, or u
};
// `Tiles` is a TokensTiles with others.
template <typename Tiles, typename T, int kC, int kK>
struct TokensShared : Tiles {
  using R = Accumulator<T>;
  using Keys = BlockProduct<T, kC, kK, kBwdWarps>;
  using Gradients = Matrix<R, kC, kK>;  // in the end, in the place of the tiles
  static_assert(sizeof(Gradients) <= sizeof(Tiles));

  TokenFactors<R, kC> factors;
  R norm[kC];                           // what x of the reader is multiplied by [norm]
  R weight[kC];                         // of dO_i, or of w_i, in the gradient of what x_i reads
  R states_dot[kK];                     // sums over values of S * dS
  R values_dot[kC];                     // w_i . v_i
  R reads[2][kC];                       // what q_i and e_i read, times dO_i and w_i
  R row_dots[kK / Keys::kColumns][kC];  // sums over keys
  TokensWork work;                      // here it costs no registers
};

// `Shared` is a TokensShared with what `Decays`, the class derived from this one, needs.
template <typename Decays, typename T, int kC, int kK, int kV, typename Shared_>
struct TokensBase {
  using R = Accumulator<T>;
  using Shared = Shared_;
  using Keys = typename Shared::Keys;
  using Pairs = BlockProduct<T, kC, kC, kBwdWarps>;
  static_assert(kC <= kWarpSize && kK <= kBwdThreads);

  const BwdParams& p;
  const BwdPlan& plan;
  const Scores<T, kC> scores;
  const Kept<T, kC, kK, kV> kept;
  Shared& shared = shared_memory<Shared>();
  Keys dq, dk, de;  // of normalized q and k, times what these are multiplied by

  __device__ __forceinline__ TokensBase(const BwdParams& params, const BwdPlan& plan_)
      : p(params), plan(plan_), scores(params, params.workspace, plan_.scores), kept{params, plan_} {
    if (threadIdx.x == 0) {
      const auto [slot, h] = divide(blockIdx.x, p.heads);
      const int64_t group = divide(p.value_heads, p.heads).quotient;
      const SlotChunk at = chunk_of_slot<kC>(p.sequences, slot);
      const Span span = row_span(p.sequences, at.row);
      const int64_t begin = at.chunk.begin;
      shared.work = {at, begin == span.begin, begin + at.chunk.count == span.end, slot, h, h * group, (h + 1) * group};
    }
    __syncthreads();
  }

  __device__ __forceinline__ void run() {
    if (work().at.chunk.count == 0) return;
    Decays& decays = static_cast<Decays&>(*this);
    dq.clear(), dk.clear(), de.clear();
#pragma unroll 1
    while (work().hv < work().end_hv) {
      load_factors<kBwdThreads>(shared.factors, scores.record(work().slot, work().hv).factors);
      decays.begin();
      commit_copies();
      dot_values();
      wait_copies<0>();
      __syncthreads();
#pragma unroll 1
      for (int reader = kQuery; reader <= kWriter; ++reader) {
        take_weights(static_cast<Reader>(reader));
        Keys z;
        Pairs s;
        gather(static_cast<Reader>(reader), z, s);
        decays.take(static_cast<Reader>(reader), z, s);
        __syncthreads();
      }
      if (p.form != Decay::kNone) decays.write_decays();
      for_each_token([&](int i) {
        if (i < work().at.chunk.count)
          store(array_of(p.dbeta), rows(p.dbeta, work().hv)[i],
                shared.values_dot[i] - shared.reads[kErase][i]);  // [dbeta]
      });
      __syncthreads();
      if (threadIdx.x == 0) ++shared.work.hv;
      __syncthreads();
    }
    finish();
  }

 protected:
  __device__ __forceinline__ const TokensWork& work() const { return shared.work; }
  template <typename F>
  __device__ __forceinline__ static void for_each_token(F&& f) {
    if (threadIdx.x < kC) f(static_cast<int>(threadIdx.x));
  }
  __device__ __forceinline__ static int warp() { return threadIdx.x / kWarpSize; }
  __device__ __forceinline__ bool exact() const { return is_exact(p); }
  __device__ __forceinline__ Rows rows(const Data& x, int64_t head) const {
    return Rows(x, p.sequences, work().at.b, work().at.chunk.begin, head);
  }
  // x of token i as it was before [norm].
  __device__ __forceinline__ const Data& rows_of(Reader reader) const {
    return reader == kQuery ? p.q : reader == kErase ? erase_of(p) : p.k;
  }
  __device__ __forceinline__ R element(const Data& x, const Rows& of_rows, int i, int key) const {
    R value = R(0);
    if (i < work().at.chunk.count && key < p.keys)
      visit_data<T>(x, [&](const auto* data) { value = to<R>(load(data + of_rows[i] + key)); });
    return value;
  }
  // To the gradient of q, of e, or of k.
  __device__ __forceinline__ void add(Reader reader, Keys& x) {
    const auto plus = [](int, int, R& sum, R value) { sum += value; };
    if (reader == kQuery)
      dq.for_each_with(x, plus);
    else if (reader == kErase && p.erase)
      de.for_each_with(x, plus);
    else
      dk.for_each_with(x, plus);
  }

 private:
  __device__ __forceinline__ void take_weights(Reader reader) {
    const bool of_erase = reader == kErase;
    for_each_token([&](int i) {
      const auto& factors = shared.factors;
      shared.norm[i] = of_erase && p.erase ? R(1) : (reader == kQuery ? factors.q_norm : factors.k_norm)[i];
      shared.weight[i] = reader == kQuery ? static_cast<R>(p.scale) : of_erase ? -factors.beta[i] : R(1);
    });
  }

  // z_i = S dO_i, S w_i, or dS u_i;  s_ij = dO_i . u_j, or w_i . u_j
  __device__ __forceinline__ void gather(Reader reader, Keys& z, Pairs& s) {
    const Data x = reader == kQuery ? Data(p.dO) : reader == kErase ? kept.w() : Data(p.u);
    z.clear(), s.clear();
#pragma unroll 1
    for (int tile = 0; tile < plan.tiles; ++tile) {
      const int64_t column = tile * kV;
      __syncthreads();
      load_tokens<kBwdThreads, 1>(shared.values, x, rows(x, work().hv), work().at.chunk.count, column,
                                  reader == kErase ? plan.tiles * kV : p.size);
      if (reader != kWriter)
        load_tokens<kBwdThreads, 1>(shared.u, p.u, rows(p.u, work().hv), work().at.chunk.count, column, p.size);
      load_state_tile(reader == kWriter, tile);
      commit_copies(), wait_copies<0>();
      __syncthreads();
      z.template add<kPlain, kTransposed>(shared.values, shared.state, 0, kV, exact());
      if (reader != kWriter) s.template add<kPlain, kTransposed>(shared.values, shared.u, 0, kV, exact());
      if (reader == kQuery && p.form != Decay::kNone) dot_states(tile);
    }
  }

  // At the edges of a sequence a state is one that was given, if any, elsewhere one that the walk has kept.
  __device__ __forceinline__ bool at_edge(bool gradient) const { return gradient ? work().last : work().first; }
  __device__ __forceinline__ const Array& given(bool gradient) const {
    return gradient ? p.dfinal_state : p.initial_state;
  }
  __device__ __forceinline__ const T* kept_state(bool gradient, int64_t tile) const {
    return kept.state(gradient ? plan.dstates : plan.states, work().at.b,
                      work().at.chunk.begin + (gradient ? work().at.chunk.count : 0), work().hv, tile);
  }
  __device__ __forceinline__ void load_state_tile(bool gradient, int64_t tile) {
    if (at_edge(gradient)) {
      const Array& from = given(gradient);
      for_each_of_state<kBwdThreads, kK, kV, 1>(
          state_shape(p), work().at.row, work().hv, tile * kV, [&](int key, int v, bool exists, int64_t place) {
            shared.state[key][v] = to<T>(exists && from ? load<R>(from, place) : R(0));
          });
      return;
    }
    constexpr int kVector = kVectorCount<T>, kVectors = kV / kVector;
    const T* const from = kept_state(gradient, tile);
#pragma unroll 1
    for (int i = threadIdx.x; i < kK * kVectors; i += kBwdThreads)
      copy_async<16>(&shared.state[i / kVectors][i % kVectors * kVector], from + i * kVector);
  }
  // S * dS, while S is here; neighbouring lanes have the values of one key.
  __device__ __forceinline__ void dot_states(int64_t tile) {
    constexpr int kVector = kVectorCount<T>, kVectors = kV / kVector;
    static_assert(kK * kVectors % kBwdThreads == 0);
    const StatePlace place(state_shape(p), work().at.row, work().hv);
    const Array& from = given(true);
#pragma unroll 1
    for (int n = threadIdx.x; n < kK * kVectors; n += kBwdThreads) {
      const int key = n / kVectors, v = n % kVectors * kVector;
      R sum = R(0);
      if (!work().last) {
        const auto dS = load<kVector>(kept_state(true, tile) + n * kVector);
#pragma unroll
        for (int e = 0; e < kVector; ++e) sum = fma(to<R>(shared.state[key][v + e]), to<R>(dS[e]), sum);
      } else if (from && key < p.keys) {
        const int valid = static_cast<int>(min(p.size - tile * kV - v, int64_t{kVector}));
        for (int e = 0; e < valid; ++e)
          sum = fma(to<R>(shared.state[key][v + e]), load<R>(from, place(key, tile * kV + v + e)), sum);
      }
#pragma unroll
      for (int distance = 1; distance < kVectors; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (v == 0) shared.states_dot[key] = (tile == 0 ? R(0) : shared.states_dot[key]) + sum;
    }
  }

  __device__ __forceinline__ void dot_values() {
    const Data w = kept.w();
    const Rows w_rows = rows(w, work().hv), v_rows = rows(p.v, work().hv);
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (int i = warp(); i < work().at.chunk.count; i += kBwdWarps) {
      R sum = R(0);
      visit_data<T>(p.v, [&](const auto* data) {
#pragma unroll 1
        for (int64_t v = lane; v < p.size; v += kWarpSize)
          sum = fma(to<R>(load(static_cast<const T*>(w.data) + w_rows[i] + v)), to<R>(load(data + v_rows[i] + v)), sum);
      });
      sum = warp_sum(sum);
      if (lane == 0) shared.values_dot[i] = sum;
    }
  }

  // [dnorm], and to the tensors; a warp takes a token's row by way of shared memory.
  __device__ __forceinline__ void finish() {
    auto& d = shared_memory<typename Shared::Gradients>();
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (int reader = kQuery; reader <= kWriter; ++reader) {
      if (reader == kErase && !p.erase) continue;
      const Data& x = rows_of(static_cast<Reader>(reader));
      const Data& to_data = reader == kQuery ? p.dq : reader == kErase ? p.derase : p.dk;
      const Rows of_x = rows(x, work().h), to_rows = rows(to_data, work().h);
      const bool normalized = p.normalize && reader != kErase && p.value_heads > 0;
      const auto put = [&](int i, int key, R& sum) { d[i][key] = sum; };
      __syncthreads();
      reader == kQuery ? dq.for_each(put) : reader == kErase ? de.for_each(put) : dk.for_each(put);
      __syncthreads();
#pragma unroll 1
      for (int i = warp(); i < work().at.chunk.count; i += kBwdWarps) {
        const auto for_each_key = [&](auto&& f) {
#pragma unroll 1
          for (int key = lane; key < p.keys; key += kWarpSize) f(key, normalized ? element(x, of_x, i, key) : R(0));
        };
        R along = R(0);
        if (normalized) {
          const R norm = (reader == kQuery ? shared.factors.q_norm : shared.factors.k_norm)[i];
          for_each_key([&](int key, R x_i) { along = fma(d[i][key], x_i, along); });
          along = norm * norm * warp_sum(along);
        }
        visit_data<T>(to_data, [&]<typename X>(X* data) {
          for_each_key([&](int key, R x_i) { store(data + to_rows[i] + key, to<X>(d[i][key] - along * x_i)); });
        });
      }
    }
  }
};

}  // namespace seqkern::delta_rule::cuda

// A block of the forward: its shared memory, and what it does with a state and with a chunk.
#pragma once

#include "delta_rule/chunk.cuh"

namespace seqkern::delta_rule::cuda {

constexpr int kFwdWarps = kFwdThreads / kWarpSize;

// What a block does.
struct FwdWork {
  Stretch stretch;
  int64_t hv, h;
  int64_t segment;
  int64_t slot;     // of the first chunk
  int64_t element;  // of the first segment of this row
  bool summarizes;  // only what the segment does to a state
  bool transition;  // to the columns of the identity, where nothing is written
};

template <typename T, int kTokens, int kKeys, int kValues>
struct FwdTiles {
  using R = Accumulator<T>;
  static constexpr bool kAhead = fetches_ahead(kDType<T>);
  Matrix<T, kTokens, kKeys> keys[kAhead ? 3 : 2];  // q, k, e
  Matrix<T, kKeys, kValues> state;                 // S as an operand
  Matrix<T, kTokens, kValues> v, u;
  Matrix<T, kTokens, kValues> carried;  // exp(c_C - c_j) u_j
  Matrix<R, kTokens, kValues> r;
  Matrix<T, kTokens, kTokens> P;
  Matrix<R, kTokens, kTokens> inverse;
};

template <typename T, int kTokens, int kKeys, int kValues>
struct FwdShared : FwdTiles<T, kTokens, kKeys, kValues> {
  using R = Accumulator<T>;
  TokenFactors<R, kTokens> factors[2];
  R total[kKeys];  // exp(c_C), where decays are per key
  FwdWork work;    // here it costs no registers
};

// A chunk on its way through a block; chunks take turns in what there is two of.
struct FwdChunk {
  Chunk chunk;  // count <= 0 where there is none
  int64_t slot;
  int turn;
};

// The walk of a block over its chunks, with its part of the state in registers and, as an operand, in shared memory.
template <typename T, int kTokens, int kKeys, int kValues>
struct FwdWalk {
  using R = Accumulator<T>;
  using Outputs = BlockProduct<T, kTokens, kValues, kFwdWarps>;
  using Solution = BlockProduct<R, kTokens, kValues, kFwdWarps>;
  using States = BlockProduct<T, kKeys, kValues, kFwdWarps>;
  using Tiles = FwdTiles<T, kTokens, kKeys, kValues>;
  static constexpr bool kAhead = Tiles::kAhead;
  using Fold = FoldRoom<R, kKeys, kValues>;
  static_assert(sizeof(Fold) <= sizeof(Tiles));

  const FwdParams& p;
  const FwdPlan& plan;
  FwdShared<T, kTokens, kKeys, kValues>& shared;
  const int column;  // the first value, or column of the transition
  States S;

  __device__ __forceinline__ const FwdWork& work() const { return shared.work; }
  __device__ __forceinline__ bool per_key() const { return p.form == Decay::kKey; }
  // Whether e is k, also in shared memory.
  __device__ __forceinline__ bool erases_keys() const { return !per_key() && !p.erase; }
  __device__ __forceinline__ auto& erase(int turn) { return shared.keys[erases_keys() ? turn : 0]; }
  __device__ __forceinline__ auto& k(int turn) { return shared.keys[erases_keys() ? turn : 1]; }
  // With room for two, q takes the place of k or e that is not, or no longer, in use.
  __device__ __forceinline__ auto& q() { return shared.keys[kAhead ? 2 : erases_keys() ? 1 : 0]; }
  // Of products over keys.
  __device__ __forceinline__ int depth() const {
    return static_cast<int>(p.keys + kDepthStep<T> - 1) / kDepthStep<T> * kDepthStep<T>;
  }
  __device__ __forceinline__ Scores<T, kTokens> scores() const { return {p, p.workspace, plan.scores}; }
  __device__ __forceinline__ Fold& fold_room() { return shared_memory<Fold>(); }

  // --- states

  // The state of a row, if there is one.
  __device__ __forceinline__ void enter() {
    S.clear();
    if (!p.initial_state) return;
    const StateShape shape = state_shape(p);
    load_state<kFwdThreads>(S, fold_room().state, p.initial_state, shape, work().stretch.state, work().hv, column);
  }
  __device__ __forceinline__ void leave() {
    if (!p.final_state) return;
    const StateShape shape = state_shape(p);
    store_state<kFwdThreads>(S, fold_room().state, p.final_state, shape, work().stretch.state, work().hv, column);
  }
  // What a summary begins with: no state, or columns of the identity.
  __device__ __forceinline__ void clear() {
    S.for_each([&](int k, int v, R& s) { s = work().transition && k == column + v ? R(1) : R(0); });
  }

  // The element of a segment: its transition (keys, plan.transitions), row by row, and then for each tile of values the
  // state from zero, in the order of threads.
  __device__ __forceinline__ R* element(int64_t segment) const {
    const int64_t index = work().element + segment * p.value_heads;
    return reinterpret_cast<R*>(static_cast<unsigned char*>(p.workspace) + plan.elements) +
           index * element_numbers(plan);
  }
  __device__ __forceinline__ R* state_of(R* element) const { return element + (plan.transitions + column) * kKeys; }
  __device__ __forceinline__ void store_element() {
    R* const numbers = element(work().segment);
    if (work().transition) {
      S.for_each_pair([&](int k, int v, R left, R right) {
        store(numbers + k * plan.transitions + column + v, Vector<R, 2>{{left, right}});
      });
    } else {
      R* to_S = state_of(numbers) + threadIdx.x;
      S.for_each([&](int, int, R& s) { store(to_S, s), to_S += kFwdThreads; });
    }
  }

  // The state goes through a segment before this one.
  __device__ __forceinline__ void pass(int64_t segment) {
    R* const numbers = element(segment);
    fold<kFwdThreads>(S, fold_room(), numbers, plan.transitions, state_of(numbers), p.keys);
  }

  // --- chunks

  __device__ __forceinline__ Rows rows(const Data& x, const Chunk& chunk, int64_t head) const {
    return Rows(x, p.sequences, work().stretch.b, chunk.begin, head);
  }
  __device__ __forceinline__ const ChunkRecord<T, kTokens>& record(const FwdChunk& at) const {
    return scores().record(at.slot, work().hv);
  }
  // Rows of keys: the tensor, or what the scores' kernel has made of it.
  __device__ __forceinline__ void load_keys(Matrix<T, kTokens, kKeys>& to_matrix, const Data& given, const Data& scaled,
                                            const Chunk& chunk) {
    const Data x = per_key() ? scaled : given;
    const Rows from = rows(x, chunk, per_key() ? work().hv : work().h);
    load_tokens<kFwdThreads, 1>(to_matrix, x, from, chunk.count, 0, p.keys);
  }

  // Copies go on while the block computes, in three groups for each chunk: what [solve] begins with, the inverse, and
  // what [chunk] and [carry] read.
  __device__ __forceinline__ void fetch_system(const FwdChunk& at) {
    if (at.chunk.count > 0) {
      load_keys(erase(at.turn), p.erase ? p.erase : p.k, scores().erase(), at.chunk);
      const int values = work().transition ? 0 : at.chunk.count;
      load_tokens<kFwdThreads, 1>(shared.v, p.v, rows(p.v, at.chunk, work().hv), values, column, p.size);
      load_factors<kFwdThreads>(shared.factors[at.turn], record(at).factors);
    }
    commit_copies();
  }
  __device__ __forceinline__ void fetch_inverse(const FwdChunk& at) {
    if (at.chunk.count > 0) load_pairs<kFwdThreads>(shared.inverse, record(at).inverse);
    commit_copies();
  }
  __device__ __forceinline__ void fetch_readers(const FwdChunk& at) {
    if (!erases_keys()) load_keys(k(at.turn), p.k, scores().k(), at.chunk);
    if (!work().summarizes) {
      if (kAhead || erases_keys()) load_keys(q(), p.q, scores().q(), at.chunk);
      load_pairs<kFwdThreads>(shared.P, record(at).P);
    }
    static_assert(kKeys <= kFwdThreads, "a thread for every key");
    if (per_key() && threadIdx.x < kKeys) {
      const bool exists = threadIdx.x < p.keys;
      const R* total = scores().total(at.slot, work().hv);
      copy_async<sizeof(R)>(&shared.total[threadIdx.x], total + (exists ? threadIdx.x : 0), exists ? sizeof(R) : 0);
    }
    commit_copies();
  }

  __device__ __forceinline__ void run() {
    // Where copies are ahead, from before the first chunk on, so that there is one place for each.
    FwdChunk at{{}, work().slot - 1, 1}, next{chunk_from(work().stretch.begin), work().slot, 0};
    if constexpr (!kAhead) at = next;
#pragma unroll 1
    do {
      const bool here = at.chunk.count > 0;
      if constexpr (!kAhead) next = after(at), fetch_system(at), fetch_inverse(at);
      if (here) {
        fetch_readers(at);
        wait_copies<2>();
        __syncthreads();
        erase_state(at);
        wait_copies<1>();
        __syncthreads();
      }
      if constexpr (kAhead)
        fetch_system(next);
      else if (here && !work().summarizes && !erases_keys())
        load_keys(q(), p.q, scores().q(), at.chunk), commit_copies();
      if (here) {
        solve(at);
        wait_copies<kAhead ? 1 : 0>();
        __syncthreads();
      }
      if constexpr (kAhead) fetch_inverse(next);
      if (here) {
        if (!work().summarizes) read(at);
        carry(at);
      }
      at = next;
      if constexpr (kAhead) next = after(at);
    } while (at.chunk.count > 0);
  }
  __device__ __forceinline__ FwdChunk after(const FwdChunk& at) const {
    return {chunk_from(at.chunk.begin + kTokens), at.slot + 1, kAhead ? 1 - at.turn : 0};
  }
  __device__ __forceinline__ Chunk chunk_from(int64_t tau) const {
    return {tau, static_cast<int>(min(work().stretch.end - tau, int64_t{kTokens})), false, false};
  }

  // Of [solve] r
  __device__ __forceinline__ void erase_state(const FwdChunk& at) {
    const TokenFactors<R, kTokens>& factors = shared.factors[at.turn];
    Outputs product;
    product.clear();
    product.template add<kPlain, kPlain>(erase(at.turn), shared.state, 0, depth(), is_exact(p));
    product.for_each([&](int i, int v, R sum) {
      const R read = erases_keys() ? factors.read[i] * factors.k_norm[i] : factors.read[i];
      shared.r[i][v] = factors.beta[i] * (to<R>(shared.v[i][v]) - read * sum);
    });
  }

  // [solve]
  __device__ __forceinline__ void solve(const FwdChunk& at) {
    const TokenFactors<R, kTokens>& factors = shared.factors[at.turn];
    Solution u;
    u.clear();
    u.template add<kPlain, kPlain>(shared.inverse, shared.r, 0, Solution::first_row() + Solution::kRows);
    u.for_each_pair([&](int i, int v, R left, R right) {
      const auto put = [&](auto& matrix, R factor) {
        *reinterpret_cast<Vector<T, 2>*>(&matrix[i][v]) = {to<T>(factor * left), to<T>(factor * right)};
      };
      put(shared.u, R(1)), put(shared.carried, per_key() ? R(1) : factors.carry[i] * factors.k_norm[i]);
    });
    if (!work().summarizes && p.u) store_values(u, p.u, at.chunk);
  }

  // [chunk]
  __device__ __forceinline__ void read(const FwdChunk& at) {
    const TokenFactors<R, kTokens>& factors = shared.factors[at.turn];
    Outputs o;
    o.clear();
    o.template add<kPlain, kPlain>(q(), shared.state, 0, depth(), is_exact(p));
    if (!per_key()) o.for_each([&](int i, int, R& sum) { sum *= factors.read[i] * factors.q_norm[i]; });
    o.template add<kPlain, kPlain>(shared.P, shared.u, 0, Outputs::first_row() + Outputs::kRows, is_exact(p));
    o.for_each([&](int, int, R& sum) { sum *= static_cast<R>(p.scale); });
    store_values(o, p.o, at.chunk);
  }

  template <typename P>
  __device__ __forceinline__ void store_values(P& values, const Data& x, const Chunk& chunk) {
    const Rows to_rows = rows(x, chunk, work().hv);
    visit_data<T>(x, [&](auto* data) {
      const bool even = whole_pairs(data, to_rows);
      values.for_each_pair([&](int i, int v, R left, R right) {
        if (i < chunk.count) store_pair(data, to_rows[i] + column + v, p.size - column - v, even, left, right);
      });
    });
  }

  // [carry]
  __device__ __forceinline__ void carry(const FwdChunk& at) {
    const R total = shared.factors[at.turn].total;
    S.for_each([&](int key, int, R& s) { s *= per_key() ? shared.total[key] : total; });
    S.template add<kTransposed, kPlain>(k(at.turn), shared.carried, 0, kTokens, is_exact(p));
    __syncthreads();
    S.store(shared.state);
  }
};

}  // namespace seqkern::delta_rule::cuda

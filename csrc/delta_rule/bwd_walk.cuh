// The walk of the backward. A block owns all keys and some values of one head of a row, or of a segment of it. It goes
// either forward with the state in registers, or backward with its gradient.
#pragma once

#include "delta_rule/bwd.cuh"

namespace seqkern::delta_rule::cuda {

enum BwdPass {
  kElements,  // only what segments do
  kWalk,
};

// What a block goes for. Those of an identity matrix find what a segment does to the gradient behind it.
enum BwdJob { kGradient, kState, kIdentity };

// What a segment does to a state that enters it, and to a gradient that enters from behind.
template <typename R, int kKeys, int kValues>
struct BwdElement {
  R *decay, *S, *dS, *N;  // S' = decay S + this S; dS' = N dS + this dS

  __device__ __forceinline__ BwdElement(void* workspace, int64_t index, int64_t tile, int64_t tiles) {
    constexpr int64_t kState = kKeys * kValues;
    decay = static_cast<R*>(workspace) + index * (kKeys + 2 * tiles * kState + kKeys * kKeys), N = decay + kKeys;
    S = N + kKeys * kKeys + tile * kState, dS = S + tiles * kState;
  }
};

// What a block works on.
struct BwdWork {
  int64_t row, segment, h, hv, tile;
  int64_t column;  // the first value
  Span span;       // of the row
  Stretch stretch;
};

template <typename T, int kC, int kK, int kV>
struct WalkShared {
  using R = Accumulator<T>;

  static constexpr bool kAhead = fetches_ahead(kDType<T>);
  static constexpr int kTurns = kAhead ? 2 : 1;
  // k, q and e, with the decays to and from the chunk's ends; without room for three e takes the place of k. Forward
  // there is only k, and chunks take turns.
  Matrix<T, kC, kK> keys[kAhead ? 3 : 2];
  Matrix<T, kK, kV> state;      // what is in registers as an operand
  Matrix<T, kC, kV> values[2];  // dn and -b; forward u, by turns
  Matrix<R, kC, kV> du;
  Matrix<T, kC, kC> P;
  Matrix<R, kC, kC> inverse;
  TokenFactors<R, kC> factors[kTurns];
  R total[kTurns][kK];  // exp(c_C), where decays are per key
  R decay[kK];          // of the segment so far
  BwdWork work;         // here it costs no registers
};

// A chunk on its way through a block; chunks take turns in what there is two of.
struct BwdChunk {
  int64_t tau;
  int turn;
};

template <typename T, int kC, int kK, int kV>
struct BwdWalk {
  using R = Accumulator<T>;
  using Values = BlockProduct<T, kC, kV, kBwdWarps>;
  using ExactValues = BlockProduct<R, kC, kV, kBwdWarps>;
  using State = BlockProduct<T, kK, kV, kBwdWarps>;
  using Shared = WalkShared<T, kC, kK, kV>;
  using Element = BwdElement<R, kK, kV>;
  using Room = FoldRoom<R, kK, kV>;
  static constexpr bool kAhead = Shared::kAhead;
  static_assert(sizeof(Room) <= sizeof(Shared) - sizeof(BwdWork) && kK <= kBwdThreads);

  const BwdParams& p;
  const BwdPlan& plan;
  const BwdPass pass;
  const Scores<T, kC> scores;
  const Kept<T, kC, kK, kV> kept;
  Shared& shared = shared_memory<Shared>();
  BwdJob job;
  State S;  // or its gradient

  __device__ __forceinline__ BwdWalk(const BwdParams& params, const BwdPlan& plan_, BwdPass pass_)
      : p(params), plan(plan_), pass(pass_), scores(params, params.workspace, plan_.scores), kept{params, plan_} {
    const auto [walk, hv] = divide(blockIdx.x, p.value_heads);
    const auto [rest, segment] = divide(walk, plan.segments);
    const auto [part, row] = divide(rest, plan.rows);
    job = part < plan.tiles ? kGradient : part < 2 * plan.tiles ? kState : kIdentity;
    if (threadIdx.x == 0) {
      const int64_t h = divide(hv, divide(p.value_heads, p.heads).quotient).quotient, tile = part - job * plan.tiles;
      shared.work = {row,
                     segment,
                     h,
                     hv,
                     tile,
                     tile * kV,
                     row_span(p.sequences, row),
                     stretch_of<kC>(p.sequences, row, segment, plan.segments)};
    }
    __syncthreads();
  }

  __device__ __forceinline__ void run() {
    enter();
    for_each_key([&](int key) { shared.decay[key] = R(1); });
    const Stretch& stretch = work().stretch;
    const bool back = job != kState;
    BwdChunk at{stretch.begin, 0};
    if (back) at.tau += (divide(stretch.end - stretch.begin + kC - 1, kC).quotient - 1) * kC;
    // Where copies are ahead, from before the first chunk on, so that there is one place for each.
    if constexpr (kAhead) at = {at.tau + (back ? kC : -kC), 1};
#pragma unroll 1
    do {
      const BwdChunk next{at.tau + (back ? -kC : kC), kAhead ? 1 - at.turn : 0};
      if constexpr (!kAhead) fetch_keys(at), fetch_readers(at);
      if (back)
        step_back(at, next);
      else
        step_forward(at, next);
      at = next;
    } while (exists(at));
    leave();
  }

 private:
  __device__ __forceinline__ const BwdWork& work() const { return shared.work; }
  template <typename F>
  __device__ __forceinline__ static void for_each_key(F&& f) {
    if (threadIdx.x < kK) f(static_cast<int>(threadIdx.x));
  }
  __device__ __forceinline__ bool exact() const { return is_exact(p); }
  // Of products over keys.
  __device__ __forceinline__ int depth() const {
    return static_cast<int>(p.keys + kDepthStep<T> - 1) / kDepthStep<T> * kDepthStep<T>;
  }
  __device__ __forceinline__ Rows rows(const Data& x, const Chunk& chunk, int64_t head) const {
    return Rows(x, p.sequences, work().stretch.b, chunk.begin, head);
  }
  __device__ __forceinline__ Element element(int64_t of_segment) const {
    const int64_t index = (work().row * plan.segments + of_segment) * p.value_heads + work().hv;
    return Element(static_cast<unsigned char*>(p.workspace) + plan.elements, index, work().tile, plan.tiles);
  }
  // f(place among all, sum) of what this thread holds, neighbouring threads side by side.
  template <typename F>
  __device__ __forceinline__ void in_order(F&& f) {
    int at = threadIdx.x, i = 0;
    S.for_each([&](int key, int, R& s) {
      if (i++ % 8 == 0) __syncwarp();  // bounds the loads on their way, and so the registers
      f(at, key, s), at += kBwdThreads;
    });
  }

  // --- the ends of a segment

  __device__ __forceinline__ void enter() {
    const Array& given = job == kState ? p.initial_state : p.dfinal_state;
    if (job == kIdentity) {
      S.for_each([&](int key, int v, R& s) { s = key == work().column + v ? R(1) : R(0); });
    } else if (pass == kElements || !given) {
      S.clear();
    } else {
      load_state<kBwdThreads>(S, shared_memory<Room>().state, given, state_shape(p), work().row, work().hv,
                              work().column);
    }
    if (pass == kElements) return;
    if (job == kState) {
#pragma unroll 1
      for (int64_t n = 0; n < work().segment; ++n) {
        const Element e = element(n);
        in_order([&](int at, int key, R& s) { s = fma(load(e.decay + key), s, load(e.S + at)); });
      }
    } else {
#pragma unroll 1
      for (int64_t n = plan.segments - 1; n > work().segment; --n) {
        const Element e = element(n);
        fold<kBwdThreads>(S, shared_memory<Room>(), e.N, kK, e.dS, p.keys);
      }
    }
  }

  __device__ __forceinline__ void leave() {
    if (pass == kElements) {
      const Element e = element(work().segment);
      if (job == kState && work().tile == 0) for_each_key([&](int key) { store(e.decay + key, shared.decay[key]); });
      if (job == kIdentity)
        S.for_each_pair([&](int key, int v, R left, R right) {
          store(e.N + key * kK + work().column + v, Vector<R, 2>{{left, right}});
        });
      else
        in_order([&](int at, int, R& s) { store((job == kState ? e.S : e.dS) + at, s); });
    } else if (job == kGradient && work().segment == 0 && p.dinitial_state) {
      auto& by_way = shared_memory<Room>().state;
      __syncthreads();
      S.for_each([&](int key, int v, R& s) { by_way[key][v] = s; });
      __syncthreads();
      for_each_of_state<kBwdThreads, kK, kV, 1>(state_shape(p), work().row, work().hv, work().column,
                                                [&](int key, int v, bool exists, int64_t at) {
                                                  if (exists) store(p.dinitial_state, at, by_way[key][v]);
                                                });
    }
  }

  // --- a chunk

  __device__ __forceinline__ bool exists(const BwdChunk& at) const {
    return at.tau >= work().stretch.begin && at.tau < work().stretch.end;
  }
  __device__ __forceinline__ Chunk chunk_of(const BwdChunk& at) const {
    return chunk_at<kC>(p.sequences, work().stretch, at.tau);
  }
  __device__ __forceinline__ int64_t slot_of(const BwdChunk& at) const {
    return first_slot<kC>(p.sequences, work().row) + divide(at.tau - work().span.begin, kC).quotient;
  }
  __device__ __forceinline__ auto& k(const BwdChunk& at) { return shared.keys[job == kState ? at.turn : 0]; }
  __device__ __forceinline__ auto& q() { return shared.keys[1]; }
  __device__ __forceinline__ auto& erase() { return shared.keys[kAhead ? 2 : 0]; }
  __device__ __forceinline__ auto& dn() { return shared.values[0]; }
  __device__ __forceinline__ auto& minus_b() { return shared.values[1]; }
  __device__ __forceinline__ R total(const BwdChunk& at, int key) const {
    return per_key() ? shared.total[at.turn][key] : shared.factors[at.turn].total;
  }

  // Copies go on while the block computes, in three groups for each chunk: what a step begins with, what [dsolve] and q
  // need, and e.
  __device__ __forceinline__ void fetch_keys(const BwdChunk& at) {
    if (exists(at)) {
      const Chunk chunk = chunk_of(at);
      const auto& record = scores.record(slot_of(at), work().hv);
      load_keys(k(at), p.k, scores.k(), chunk);
      if (job == kState)
        load_values(shared.values[at.turn], p.u, chunk);
      else
        load_pairs<kBwdThreads>(shared.P, record.P);
      load_factors<kBwdThreads>(shared.factors[at.turn], record.factors);
      if (per_key()) {
        for_each_key([&](int key) {
          const bool is_key = key < p.keys;
          const R* const totals = scores.total(slot_of(at), work().hv);
          copy_async<sizeof(R)>(&shared.total[at.turn][key], totals + (is_key ? key : 0), is_key ? sizeof(R) : 0);
        });
      }
    }
    commit_copies();
  }
  __device__ __forceinline__ void fetch_readers(const BwdChunk& at) {
    if (exists(at) && job != kState) {
      const Chunk chunk = chunk_of(at);
      load_keys(q(), p.q, scores.q(), chunk);
      if (job == kGradient) load_values(dn(), p.dO, chunk);
      load_pairs<kBwdThreads>(shared.inverse, scores.record(slot_of(at), work().hv).inverse);
    }
    commit_copies();
  }
  __device__ __forceinline__ void fetch_erase(const BwdChunk& at) {
    if (exists(at) && job != kState) load_keys(erase(), erase_of(p), scores.erase(), chunk_of(at));
    commit_copies();
  }
  // All but the last group.
  __device__ __forceinline__ static void wait_for_copies() {
    wait_copies<kAhead ? 1 : 0>();
    __syncthreads();
  }
  __device__ __forceinline__ bool per_key() const { return p.form == Decay::kKey; }
  // Rows of q, e or k; where decays are per key those that the scores' kernel has multiplied by them.
  __device__ __forceinline__ void load_keys(Matrix<T, kC, kK>& to_matrix, const Data& plain, const Data& scaled,
                                            const Chunk& chunk) const {
    const Data x = per_key() ? Data(scaled) : Data(plain);
    load_tokens<kBwdThreads, 1>(to_matrix, x, rows(x, chunk, per_key() ? work().hv : work().h), chunk.count, 0, p.keys);
  }
  __device__ __forceinline__ void load_values(Matrix<T, kC, kV>& to_matrix, const Data& x, const Chunk& chunk) const {
    load_tokens<kBwdThreads, 1>(to_matrix, x, rows(x, chunk, work().hv), chunk.count, work().column, p.size);
  }
  template <typename Factor>
  __device__ __forceinline__ void scale(Matrix<T, kC, kK>& x, Factor&& factor) const {
    if (per_key()) return;
    constexpr int kVector = kVectorCount<T>, kVectors = kK / kVector;
#pragma unroll 1
    for (int at = threadIdx.x; at < kC * kVectors; at += kBwdThreads) {
      const int i = at / kVectors;
      auto& row_part = *reinterpret_cast<Vector<T, kVector>*>(&x[i][at % kVectors * kVector]);
#pragma unroll
      for (int n = 0; n < kVector; ++n) row_part[n] = to<T>(factor(i) * to<R>(row_part[n]));
    }
  }
  // The state before a token, or its gradient, as an operand; to the workspace too unless it is at the sequence's edge.
  __device__ __forceinline__ void keep(int64_t at, int64_t tau, bool edge) {
    constexpr int kVector = kVectorCount<T>, kVectors = kV / kVector;
    S.store(shared.state);
    __syncthreads();
    if (pass == kElements || edge) return;
    T* const to_state = kept.state(at, work().stretch.b, tau, work().hv, work().tile);
#pragma unroll 1
    for (int n = threadIdx.x; n < kK * kVectors; n += kBwdThreads)
      store(to_state + n * kVector,
            *reinterpret_cast<const Vector<T, kVector>*>(&shared.state[n / kVectors][n % kVectors * kVector]));
  }
  __device__ __forceinline__ void decay_state(const BwdChunk& at) {
    S.for_each([&](int key, int, R& s) { s *= total(at, key); });
    for_each_key([&](int key) { shared.decay[key] *= total(at, key); });
  }
  __device__ __forceinline__ void scale_k(const BwdChunk& at) {
    const auto& factors = shared.factors[at.turn];
    scale(k(at), [&](int i) { return factors.carry[i] * factors.k_norm[i]; });
  }

  __device__ __forceinline__ void step_forward(const BwdChunk& at, const BwdChunk& next) {  // [carry]
    const bool here = exists(at);
    if (here) wait_for_copies();
    if constexpr (kAhead) fetch_keys(next), fetch_readers(next), fetch_erase(next);
    if (!here) return;
    scale_k(at);
    keep(plan.states, at.tau, at.tau == work().span.begin);
    decay_state(at);
    S.template add<kTransposed, kPlain>(k(at), shared.values[at.turn], 0, kC, exact());
    __syncthreads();
  }

  __device__ __forceinline__ void step_back(const BwdChunk& at, const BwdChunk& next) {
    const bool here = exists(at);
    if (here) take_du(at);
    kAhead ? fetch_keys(next) : fetch_erase(at);
    if (here) {
      solve_back(at);
      decay_state(at);  // [dcarry]
      if (job == kGradient) S.template add<kTransposed, kPlain>(q(), dn(), 0, kC, exact());
      wait_for_copies();
    }
    if constexpr (kAhead) fetch_readers(next);
    if (here) {
      const auto& factors = shared.factors[at.turn];
      const bool of_k = !p.erase;
      scale(erase(), [&](int i) { return factors.read[i] * (of_k ? factors.k_norm[i] : R(1)); });
      __syncthreads();
      S.template add<kTransposed, kPlain>(erase(), minus_b(), 0, kC, exact());
      __syncthreads();
    }
    if constexpr (kAhead) fetch_erase(next);
  }
  // [du]
  __device__ __forceinline__ void take_du(const BwdChunk& at) {
    const auto& factors = shared.factors[at.turn];
    wait_for_copies();
    scale_k(at);
    scale(q(), [&](int i) { return factors.read[i] * factors.q_norm[i]; });
    if (job == kGradient) scale_dn();
    const Chunk chunk = chunk_of(at);
    const int64_t end = chunk.begin + chunk.count;
    keep(plan.dstates, end, end == work().span.end);
    Values du;
    du.clear();
    if (job == kGradient) du.template add<kTransposed, kPlain>(shared.P, dn(), 0, kC, exact());
    du.template add<kPlain, kPlain>(k(at), shared.state, 0, depth(), exact());
    du.for_each_pair(
        [&](int j, int v, R left, R right) { *reinterpret_cast<Vector<R, 2>*>(&shared.du[j][v]) = {left, right}; });
    __syncthreads();
  }
  // [dsolve]
  __device__ __forceinline__ void solve_back(const BwdChunk& at) {
    const auto& factors = shared.factors[at.turn];
    ExactValues w;
    w.clear();
    w.template add<kTransposed, kPlain>(shared.inverse, shared.du, 0, kC);
    if (pass == kWalk) keep_values(w, kept.w(), plan.tiles * kV, at);
    w.for_each([&](int i, int, R& x) { x *= factors.beta[i]; });
    if (pass == kWalk) keep_values(w, p.dv, p.size, at);
    w.for_each_pair([&](int i, int v, R left, R right) {
      *reinterpret_cast<Vector<T, 2>*>(&minus_b()[i][v]) = {to<T>(-left), to<T>(-right)};
    });
  }
  __device__ __forceinline__ void scale_dn() {
#pragma unroll 1
    for (int at = threadIdx.x; at < kC * kV; at += kBwdThreads) {
      T& x = dn()[at / kV][at % kV];
      x = to<T>(static_cast<R>(p.scale) * to<R>(x));
    }
  }

  // Of (B, L, HV, size).
  __device__ __forceinline__ void keep_values(ExactValues& x, const Data& to_data, int64_t size, const BwdChunk& at) {
    const Chunk chunk = chunk_of(at);
    const Rows to_rows = rows(to_data, chunk, work().hv);
    visit_data<T>(to_data, [&](auto* data) {
      const bool even = whole_pairs(data, to_rows);
      x.for_each_pair([&](int i, int v, R left, R right) {
        if (i < chunk.count)
          store_pair(data, to_rows[i] + work().column + v, size - work().column - v, even, left, right);
      });
    });
  }
};

}  // namespace seqkern::delta_rule::cuda

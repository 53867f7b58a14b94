// What the walks of the backward have in common, whatever the decays are: which part of a head a block has, how states
// and tensors come and go, and the loops over chunks. A block owns all keys and some values of one head of a row, or of
// a segment of it. It first goes forward for the states before each chunk, then backward with the gradient of the state
// in registers.
#pragma once

#include "linear_attention/bwd.cuh"

namespace seqkern::linear_attention::cuda {

// What a segment does to a state that enters it, and to a gradient that enters from behind.
template <typename R, int kKeys, int kValues>
struct Element {
  R S[kKeys * kValues], dS[kKeys * kValues];  // in the order of threads
  R z[kKeys], dz[kKeys];
  R decay[kKeys];
  R dm, passes;  // what reaches m before the segment; 1 if what enters from behind reaches it too
};

// Products of a tile (C, K, V), and how warps share them.
template <typename T, int kC, int kK, int kV>
struct Products {
  static constexpr int kWarps = kBwdThreads / kWarpSize;
  static constexpr int kTokenWarps = kC >= 32 ? 2 : 1;
  static constexpr int kValueWarps = kV >= 16 ? 2 : 1;
  static constexpr int columns(int size) { return size / 8 < kWarps / kTokenWarps ? size / 8 : kWarps / kTokenWarps; }

  using Tokens = Product<T, kC, kC, kTokenWarps, columns(kC)>;
  using Keys = Product<T, kC, kK, kTokenWarps, columns(kK)>;
  using Values = Product<T, kC, kV, kTokenWarps, columns(kV)>;
  using State = Product<T, kK, kV, kWarps / kValueWarps, kValueWarps>;
};

template <typename T, int kC, int kK, int kV>
struct WalkShared {
  using R = Accumulator<T>;
  static constexpr int kWarps = kBwdThreads / kWarpSize;

  Matrix<T, kC, kK> q, k;
  Matrix<T, kC, kV> v, dn;  // v becomes dv
  Matrix<T, kK, kV> state;  // S before the chunk, then dS behind it
  Matrix<T, kC, kC> P;      // P_ij
  // All of the above make room for a state of accumulators between chunks.
  static constexpr int64_t kRoom = 2 * (sizeof(Matrix<T, kC, kK>) + sizeof(Matrix<T, kC, kV>)) +
                                   sizeof(Matrix<T, kK, kV>) + sizeof(Matrix<T, kC, kC>);
  static constexpr int64_t kState = sizeof(Matrix<R, kK, kV>);
  alignas(16) unsigned char more_room[kState > kRoom ? kState - kRoom : 16];
  R z[kK], dz[kK], bonus[kK];
  R de[kC], dm[kC];  // de_i, and what m_i gets of its own
  R bonus_read[kC];  // q_i . (bonus * k_i)
  R diagonal[kC];    // dP_ii; read current: P_ii dP_ii / w_i
  R warp_sums[kWarps];
};

// `Shared` is a WalkShared with what the chunks of `Decays` need.
template <typename T, int kC, int kK, int kV, typename Shared>
struct WalkBase {
  using R = Accumulator<T>;
  using Cut = Products<T, kC, kK, kV>;
  using State = typename Cut::State;
  static constexpr int kStep = kDepthStep<T>, kAtOnce = kColumnsAtOnce<T>;

  const BwdParams& p;
  const BwdPlan& plan;
  Shared& shared;
  const Place place;
  const int64_t column;  // the first of the block's values
  const int keys;        // K, in whole steps of products
  const bool exact;      // fp16 data need no more than tf32
  const BwdPass pass;
  R final_dot = R(0);  // dfinal_state . final state
  R dm_later = R(0);   // what reaches m_t from later tokens; in all lanes of the first warp
  R passes = R(1);     // whether all tokens so far pass it on
  R dA = R(0), dbias = R(0), ddecay = R(0), dbonus = R(0), dskip[kAtOnce] = {};

  __device__ __forceinline__ WalkBase(const BwdParams& params, const BwdPlan& plan_, Shared& shared_, BwdPass pass_)
      : p(params),
        plan(plan_),
        shared(shared_),
        place(Place::of_block<kC>(params, plan_)),
        column(place.tile * kV),
        keys(static_cast<int>((params.keys + kStep - 1) / kStep * kStep)),
        exact(params.q.dtype != DType::kFloat16),
        pass(pass_) {}

  __device__ __forceinline__ static int warp() { return threadIdx.x / kWarpSize; }
  __device__ __forceinline__ bool normalized() const { return p.normalizer != Normalizer::kNone; }
  __device__ __forceinline__ int depth(const Chunk& chunk) const { return (chunk.count + kStep - 1) / kStep * kStep; }
  __device__ __forceinline__ int64_t tokens() const { return p.sequences.batch * p.sequences.length; }
  __device__ __forceinline__ int64_t head_of(int64_t row) const { return row * p.value_heads + place.hv; }
  __device__ __forceinline__ Rows rows(const Data& x, const Chunk& chunk, int64_t head) const {
    return {x, p.sequences, place.stretch.b, chunk.begin, head};
  }
  template <typename X>
  __device__ __forceinline__ X* in_workspace(int64_t at) const {
    return reinterpret_cast<X*>(static_cast<unsigned char*>(p.workspace) + at);
  }
  // This tile's part of `count` numbers that tiles share.
  __device__ __forceinline__ Array part(int64_t at, int64_t count) const {
    return {in_workspace<R>(at) + place.tile * count, p.accumulator};
  }
  // Of the states that are kept, the one before a chunk that is not its sequence's first.
  __device__ __forceinline__ int64_t slot(const Chunk& chunk) const {
    return ((place.stretch.b * plan.slots + chunk.begin / kC) * p.value_heads + place.hv) * plan.tiles + place.tile;
  }
  __device__ __forceinline__ Element<R, kK, kV>& element(int64_t segment) const {
    const int64_t walk = place.walk + (segment - place.segment) * plan.tiles;
    return in_workspace<Element<R, kK, kV>>(plan.workspace.elements)[walk * p.value_heads + place.hv];
  }
  template <typename F>
  __device__ __forceinline__ void for_each_key(F&& f) const {
    const int key = threadIdx.x;
    static_assert(kK <= kBwdThreads);
    if (key < kK) f(key);
  }
  __device__ __forceinline__ R block_total(R value) { return block_sum<kBwdThreads>(value, shared.warp_sums); }

  // --- states

  // A row of the initial state; -1 where there is none, or its m is -inf.
  __device__ __forceinline__ int64_t given_row(int64_t row) const {
    if (!p.initial_state) return -1;
    return row >= 0 && p.initial_state.m && load<R>(p.initial_state.m, head_of(row)) == -kInfinity<R> ? -1 : row;
  }
  // That which enters before token tau.
  __device__ __forceinline__ int64_t entering_row(int64_t tau) const {
    return given_row(initial_row(p.sequences, place.stretch.b, {tau, tau, place.stretch.state, false}));
  }
  __device__ __forceinline__ int64_t final_row_of(const Chunk& chunk) const {
    const int64_t end = chunk.begin + chunk.count;
    return final_row(p.sequences, place.stretch.b, {end, end, place.stretch.state, false});
  }
  // m before a chunk.
  __device__ __forceinline__ R m_before(const Chunk& chunk, bool first) const {
    if (p.gates.form != Form::kExp) return R(0);
    if (!first) return load(static_cast<const R*>(p.maxima) + place.token(p, chunk.begin - 1));
    const int64_t row = entering_row(chunk.begin);
    return row < 0 ? -kInfinity<R> : load<R>(p.initial_state.m, head_of(row));
  }
  // States pass through shared memory that no chunk is using, so that neighbouring threads have neighbouring elements.
  __device__ __forceinline__ Matrix<R, kK, kV>& by_way() { return reinterpret_cast<Matrix<R, kK, kV>&>(shared); }
  // f(key, value, whether there are such, place) for a row of states.
  template <typename F>
  __device__ __forceinline__ void for_each_of_state(int64_t row, F&& f) {
    const StatePlace at(state_shape(p), row, place.hv);
#pragma unroll 1
    for (int i = threadIdx.x; i < kK * kV; i += kBwdThreads) {
      const int key = p.value_major ? i % kK : i / kV, v = p.value_major ? i / kK : i % kV;
      f(key, v, key < p.keys && column + v < p.size, at(key, column + v));
    }
  }
  __device__ __forceinline__ void read_state(State& S, const Array& from, int64_t row) {
    for_each_of_state(
        row, [&](int key, int v, bool exists, int64_t at) { by_way()[key][v] = exists ? load<R>(from, at) : R(0); });
    __syncthreads();
    S.for_each([&](int key, int v, R& s) { s = by_way()[key][v]; });
    __syncthreads();
  }
  __device__ __forceinline__ void spread(State& S) {
    __syncthreads();
    S.for_each([&](int key, int v, R& s) { by_way()[key][v] = s; });
    __syncthreads();
  }
  // A row of z or dz, 0 where there is none.
  __device__ __forceinline__ void load_sums(R* sums, const Array& from, int64_t row) {
    for_each_key([&](int key) {
      sums[key] = from && row >= 0 && key < p.keys ? load<R>(from, head_of(row) * p.keys + key) : R(0);
    });
  }
  // f(place among all, key, sum) of what this thread holds, neighbouring threads side by side.
  template <typename F>
  __device__ __forceinline__ static void in_order(State& S, F&& f) {
    int at = threadIdx.x;
    S.for_each([&](int key, int, R& s) { f(at, key, s), at += kBwdThreads; });
  }

  // The state before this segment, `count` segments of a row whose initial state is `row`; or the gradient behind it,
  // of one whose final state is `row`.
  __device__ __forceinline__ void enter(State& S, bool back, int64_t row, int64_t count) {
    const linear_attention::State& from = back ? p.dfinal_state : p.initial_state;
    const bool given = from && row >= 0, whole = !back || place.tile == 0;
    R* const sums = back ? shared.dz : shared.z;
    S.clear();
    if (given) read_state(S, from.S, row);
    load_sums(sums, from.z, whole && given ? row : -1);
    dm_later = R(0);
    if (back && given && from.m) dm_later = (whole ? load<R>(from.m, head_of(row)) : R(0)) - final_dot;
#pragma unroll 1
    for (int64_t n = 0; n < count; ++n) {
      const Element<R, kK, kV>& e = element(back ? plan.segments - 1 - n : n);
      const R* const states = back ? e.dS : e.S;
      in_order(S, [&](int at, int key, R& s) { s = fma(load(&e.decay[key]), s, load(states + at)); });
      for_each_key([&](int key) { sums[key] = fma(load(&e.decay[key]), sums[key], load((back ? e.dz : e.z) + key)); });
      if (back) dm_later = load(&e.dm) + (load(&e.passes) != R(0) ? dm_later : R(0));
    }
  }

  __device__ __forceinline__ void keep(State& S, const Chunk& chunk) {
    T* const states = in_workspace<T>(plan.workspace.states) + slot(chunk) * kK * kV;
    S.for_each_pair([&](int key, int v, R& left, R& right) {
      store(states + key * kV + v, Vector<T, 2>{{to<T>(left), to<T>(right)}});
    });
    R* const sums = in_workspace<R>(plan.workspace.sums) + slot(chunk) * kK;
    if (normalized()) for_each_key([&](int key) { store(sums + key, shared.z[key]); });
  }
  // The state before a chunk as an operand: the initial state of row `row`, or what was kept.
  __device__ __forceinline__ void load_operand(const Chunk& chunk, bool first) {
    if (first) {
      const int64_t row = entering_row(chunk.begin);
      for_each_of_state(row, [&](int key, int v, bool exists, int64_t at) {
        shared.state[key][v] = to<T>(exists && row >= 0 ? load<R>(p.initial_state.S, at) : R(0));
      });
      return load_sums(shared.z, p.initial_state.z, row);
    }
    constexpr int kVector = kVectorCount<T>, kVectors = kV / kVector;
    const T* const states = in_workspace<T>(plan.workspace.states) + slot(chunk) * kK * kV;
    for (int at = threadIdx.x; at < kK * kVectors; at += kBwdThreads) {
      copy_async<16>(&shared.state[at / kVectors][at % kVectors * kVector], states + at * kVector);
    }
    const R* const sums = in_workspace<R>(plan.workspace.sums) + slot(chunk) * kK;
    if (normalized()) for_each_key([&](int key) { shared.z[key] = load(sums + key); });
  }

  // dfinal_state . final state, for the gradient of the maximum.
  __device__ __forceinline__ void dot_final(State& S, int64_t row) {
    if (row < 0) return;
    spread(S);
    R dot = R(0);
    for_each_of_state(row, [&](int key, int v, bool exists, int64_t at) {
      if (exists) dot = fma(by_way()[key][v], load<R>(p.dfinal_state.S, at), dot);
    });
    for_each_key([&](int key) {
      if (key < p.keys && place.tile == 0)
        dot = fma(shared.z[key], load<R>(p.dfinal_state.z, head_of(row) * p.keys + key), dot);
    });
    final_dot = block_total(dot);
  }
  // What tiles share of the gradient of a state that no token may read.
  __device__ __forceinline__ void clear_shared_sums() {
    if (plan.tiles == 1 || !p.dinitial_state.z) return;
    const int64_t heads = p.sequences.count * p.value_heads, head = head_of(place.stretch.state);
    for_each_key([&](int key) {
      if (key < p.keys) store(part(plan.workspace.dz, heads * p.keys), head * p.keys + key, R(0));
    });
    if (p.dinitial_state.m && threadIdx.x == 0) store(part(plan.workspace.dm, heads), head, R(0));
  }
  // The gradient of the initial state, which also is what its m scales where tokens have read it.
  __device__ __forceinline__ void leave(State& dS, int64_t row, bool scales) {
    if (row < 0) return;
    spread(dS);
    scales = scales && p.initial_state.m;
    R dot = R(0);
    for_each_of_state(row, [&](int key, int v, bool exists, int64_t at) {
      if (!exists) return;
      const R s = by_way()[key][v];
      store(p.dinitial_state.S, at, s);
      if (scales) dot = fma(s, load<R>(p.initial_state.S, at), dot);
    });
    const int64_t heads = p.sequences.count * p.value_heads;
    const bool shares = plan.tiles > 1;
    if (normalized()) {
      const Array dz = shares ? part(plan.workspace.dz, heads * p.keys) : p.dinitial_state.z;
      for_each_key([&](int key) {
        if (key >= p.keys) return;
        const int64_t at = head_of(row) * p.keys + key;
        store(dz, at, shared.dz[key]);
        if (scales) dot = fma(shared.dz[key], load<R>(p.initial_state.z, at), dot);
      });
    }
    if (!p.initial_state.m) return;
    dot = block_total(dot);
    if (threadIdx.x == 0)
      store(shares ? part(plan.workspace.dm, heads) : p.dinitial_state.m, head_of(row), dot + dm_later);
  }

  // --- tokens

  // A chunk's rows of k, v and, from `first` = 0 on, q.
  __device__ __forceinline__ void load_rows(const Chunk& chunk, int first, int last) {
#pragma unroll 1
    for (int which = first; which <= last; ++which) {
      const bool values = which == 2;
      const Data x = values ? p.v : which == 1 ? p.k : p.q;
      const Rows from_rows = rows(x, chunk, values ? place.hv : place.h);
      const int vectors = (values ? kV : kK) / kAtOnce;
      T* const to_rows = values ? shared.v[0] : which == 1 ? shared.k[0] : shared.q[0];
      const int stride = values ? Matrix<T, kC, kV>::kStride : Matrix<T, kC, kK>::kStride;
      const int64_t size = values ? p.size - column : p.keys;
      visit_data<T>(x, [&]<typename X>(const X* data) {
        data += values ? column : 0;
        const bool whole =
            ((reinterpret_cast<uintptr_t>(data) | from_rows.first * sizeof(X) | from_rows.step * sizeof(X)) % 16) == 0;
#pragma unroll 1
        for (int at = threadIdx.x; at < kC * vectors; at += kBwdThreads) {
          const int i = at / vectors, j = (at - i * vectors) * kAtOnce;
          const int valid = i < chunk.count ? static_cast<int>(clamp(size - j, 0, kAtOnce)) : 0;
          const X* const from = data + (valid > 0 ? from_rows[i] + j : 0);
          T* const here = to_rows + i * stride + j;
          if (std::is_same_v<X, T> && whole && valid == kAtOnce) {
#pragma unroll
            for (int e = 0; e < kAtOnce; e += kVectorCount<T>) copy_async<16>(here + e, from + e);
          } else {
            R x[kAtOnce];
            read_elements<kAtOnce>(from, valid, x);
            put(here, x);
          }
        }
      });
    }
  }

  // dn_i, de_i, what m_i gets of its own, and dgate [dout]; a lane has some values of a token, neighbours the others.
  __device__ __forceinline__ void load_values(const Chunk& chunk) {
    constexpr int kGroups = kV / kAtOnce;
    const Rows dy_rows = rows(p.dy, chunk, place.hv), o_rows = rows(p.o, chunk, place.hv),
               v_rows = rows(p.v, chunk, place.hv), gate_rows = rows(p.gate, chunk, place.hv),
               dgate_rows = rows(p.dgate, chunk, place.hv);
#pragma unroll 1
    for (int at = threadIdx.x; at < kC * kGroups; at += kBwdThreads) {
      const int i = at / kGroups, v = at % kGroups * kAtOnce;
      const int valid = i < chunk.count ? static_cast<int>(clamp(p.size - column - v, 0, kAtOnce)) : 0;
      R d[kAtOnce] = {}, o[kAtOnce] = {}, skipped[kAtOnce] = {};
      if (valid > 0) {
        visit_data<T>(p.dy, [&](const auto* x) { read_elements<kAtOnce>(x + dy_rows[i] + column + v, valid, d); });
        if (p.o)
          visit_data<T>(p.o, [&](const auto* x) { read_elements<kAtOnce>(x + o_rows[i] + column + v, valid, o); });
        if (p.skip)
          visit_data<T>(p.v,
                        [&](const auto* x) { read_elements<kAtOnce>(x + v_rows[i] + column + v, valid, skipped); });
      }
      if (p.gate && valid > 0) {
        R gate[kAtOnce], dgate[kAtOnce];
        visit(array_of(p.gate),
              [&](const auto* x) { read_elements<kAtOnce>(x + gate_rows[i] + column + v, valid, gate); });
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
          const R y = e < valid ? fma(skip_of(v + e), skipped[e], o[e]) : R(0);
          dgate[e] = d[e] * y * silu_derivative<T>(gate[e]);
          d[e] *= silu<T>(gate[e]);
        }
        if (pass == kWalk)
          visit(array_of(p.dgate),
                [&](auto* x) { write_elements<kAtOnce>(x + dgate_rows[i] + column + v, valid, dgate); });
      }
      R own = R(0);
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        own = fma(d[e], o[e], own);
        if (pass == kWalk) dskip[e] = fma(d[e], skipped[e], dskip[e]);
      }
#pragma unroll
      for (int distance = 1; distance < kGroups; distance *= 2) own += __shfl_xor_sync(0xffffffffu, own, distance);
      R de = R(0), dm = R(0);
      const R factor = i < chunk.count ? normalize(chunk.begin + i, own, de, dm) : R(0);
      if (v == 0) shared.de[i] = de, shared.dm[i] = dm;
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) d[e] *= factor;
      put(&shared.dn[i][v], d);
    }
  }
  __device__ __forceinline__ R skip_of(int v) const {
    return p.skip && column + v < p.size ? load<R>(p.skip, place.hv * p.skip_h + (column + v) * p.skip_v) : R(0);
  }
  // dn_t / do_t of [norm], with do_t . o_t.
  __device__ __forceinline__ R normalize(int64_t tau, R own, R& de, R& dm) const {
    const R scale = R(p.scale), eps = R(p.eps);
    if (!normalized()) return scale;
    const int64_t token = place.token(p, tau);
    const R e = load(static_cast<const R*>(p.denominators) + token);
    if (p.normalizer == Normalizer::kSum) {
      const R inverse = R(1) / (e + eps);
      de = -own * inverse;
      return scale * inverse;
    }
    const R m = load(static_cast<const R*>(p.maxima) + token);
    if (m == -kInfinity<R>) return R(0);
    const R size = fabs(scale * e), least = exp_of<T>(-m), inverse = R(1) / (max(size, least) + eps);
    de = size <= least ? R(0) : -own * inverse * (e < R(0) ? -scale : scale);
    dm = -own * eps * inverse;
    return scale * inverse;
  }

  // q_i . (bonus * k_i)
  __device__ __forceinline__ void read_bonus() {
    const int lane = threadIdx.x % kWarpSize;
    for (int i = warp(); i < kC; i += Cut::kWarps) {
      R sum = R(0);
      for (int key = lane; key < keys; key += kWarpSize) {
        sum = fma(to<R>(shared.q[i][key]), shared.bonus[key] * to<R>(shared.k[i][key]), sum);
      }
      sum = warp_sum(sum);
      if (lane == 0) shared.bonus_read[i] = sum;
    }
    __syncthreads();
  }

  // To dq or dk, or this block's part of them.
  template <typename P>
  __device__ __forceinline__ void store_keys(P& x, const Data& data, int64_t at, const Chunk& chunk) {
    const auto store_rows = [&](auto* to_rows, const Rows& row, int64_t size) {
      x.for_each_pair([&](int i, int key, R left, R right) {
        if (i < chunk.count && key < size) store_pair(to_rows, row[i] + key, 2, true, left, right);
      });
    };
    if (plan.share_keys)
      store_rows(keys_part(at), rows(part_of_keys(), chunk, place.hv), kK);
    else
      visit_data<T>(data, [&](auto* elements) { store_rows(elements, rows(data, chunk, place.h), p.keys); });
  }
  // Parts of dq and dk, in the workspace: (tiles, B, L, HV, kK).
  __device__ __forceinline__ R* keys_part(int64_t at) const {
    return in_workspace<R>(at) + place.tile * tokens() * p.value_heads * kK;
  }
  __device__ __forceinline__ Data part_of_keys() const {
    const int64_t row = p.value_heads * kK;
    Data part{};
    part.b = p.sequences.length * row, part.l = row, part.h = kK;
    return part;
  }

  __device__ __forceinline__ void dv(const Chunk& chunk) {  // [dv]
    typename Cut::Values x;
    x.clear();
    x.template add<kTransposed, kPlain>(shared.P, shared.dn, 0, depth(chunk), exact);
    x.template add<kPlain, kPlain>(shared.k, shared.state, 0, keys, exact);
    x.store(shared.v);
  }
  // dv, to which [skip] adds D do.
  __device__ __forceinline__ void store_values(const Chunk& chunk) {
    constexpr int kGroups = kV / kAtOnce;
    const Rows dv_rows = rows(p.dv, chunk, place.hv), dy_rows = rows(p.dy, chunk, place.hv),
               gate_rows = rows(p.gate, chunk, place.hv);
#pragma unroll 1
    for (int at = threadIdx.x; at < chunk.count * kGroups; at += kBwdThreads) {
      const int i = at / kGroups, v = at % kGroups * kAtOnce;
      const int valid = static_cast<int>(clamp(p.size - column - v, 0, kAtOnce));
      if (valid == 0) continue;
      R x[kAtOnce];
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) x[e] = to<R>(shared.v[i][v + e]);
      if (p.skip) {
        R d[kAtOnce];
        visit_data<T>(p.dy,
                      [&](const auto* data) { read_elements<kAtOnce>(data + dy_rows[i] + column + v, valid, d); });
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
          if (p.gate && e < valid) d[e] *= silu<T>(load<R>(array_of(p.gate), gate_rows[i] + column + v + e));
          x[e] = fma(skip_of(v + e), d[e], x[e]);
        }
      }
      visit_data<T>(p.dv, [&](auto* data) { write_elements<kAtOnce>(data + dv_rows[i] + column + v, valid, x); });
    }
  }
  // Padding has no gradient.
  __device__ __forceinline__ void clear_outputs(const Chunk& chunk) {
    const auto clear = [&](const Array& array, const Rows& row, int64_t first, int64_t size) {
#pragma unroll 1
      for (int64_t at = threadIdx.x; at < chunk.count * size; at += kBwdThreads) {
        const auto [i, column_] = divide(at, size);
        store(array, row[static_cast<int>(i)] + first + column_, R(0));
      }
    };
    const int64_t values = clamp(p.size - column, 0, kV);
#pragma unroll 1
    for (int which = 0; which < 6; ++which) {
      const bool numbers = which >= 4, per_key = numbers && p.gates.form == Form::kKey;
      const Data x = which == 0   ? p.dq
                     : which == 1 ? p.dk
                     : which == 2 ? p.dv
                     : which == 3 ? p.dgate
                     : which == 4 ? p.ddecay
                                  : p.dinput;
      if (!x || (numbers && is_constant(p))) continue;
      Array to_array = array_of(x);
      Rows row = rows(x, chunk, which < 2 ? place.h : place.hv);
      int64_t first = which == 2 || which == 3 ? column : 0, size = which < 2 || per_key ? p.keys
                                                                    : numbers            ? 1
                                                                                         : values;
      if (which < 2 && plan.share_keys) {
        to_array = {keys_part(which == 0 ? plan.workspace.dq : plan.workspace.dk), p.accumulator}, size = kK;
        row = rows(part_of_keys(), chunk, place.hv);
      } else if (numbers && plan.tiles > 1) {
        to_array = part(which == 4 ? plan.workspace.ddecay : plan.workspace.dinput, tokens() * p.value_heads * size);
        row = Rows(strides_of(size), p.sequences, place.stretch.b, chunk.begin, place.hv);
      }
      clear(to_array, row, first, size);
    }
  }
  // Of a contiguous (B, L, HV, size).
  __device__ __forceinline__ Data strides_of(int64_t size) const {
    Data x{};
    x.b = p.sequences.length * p.value_heads * size, x.l = p.value_heads * size, x.h = size;
    return x;
  }
  // One number or row of the gates' gradients, or this tile's part of it.
  __device__ __forceinline__ void store_gate(const Data& data, int64_t at, const Chunk& chunk, int i, int64_t size,
                                             int64_t j, R value) const {
    if (plan.tiles == 1)
      store(array_of(data), rows(data, chunk, place.hv)[i] + j, value);
    else
      store(part(at, tokens() * p.value_heads * size), place.token(p, chunk.begin + i) * size + j, value);
  }

  // This block's part of the gradients of parameters.
  __device__ __forceinline__ void store_parameters() {
    const BwdWorkspace& w = plan.workspace;
    const int64_t head = place.walk * p.value_heads + place.hv;
    const auto store_sum = [&](int64_t at, R sum) {
      sum = warp_sum(sum);
      if (threadIdx.x == 0) store(in_workspace<R>(at) + head, sum);
    };
    if (warp() == 0) {
      if (p.dA) store_sum(w.dA, dA);
      if (p.dbias) store_sum(w.dbias, dbias);
      if (is_constant(p)) store_sum(w.ddecay, ddecay);
    }
    if (p.dbonus) {
      for_each_key([&](int key) {
        if (key < p.keys) store(in_workspace<R>(w.dbonus) + head * p.keys + key, dbonus);
      });
    }
    if (!p.dskip) return;
    constexpr int kGroups = kV / kAtOnce;
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
#pragma unroll
      for (int distance = kGroups; distance < kWarpSize; distance *= 2)
        dskip[e] += __shfl_xor_sync(0xffffffffu, dskip[e], distance);
      if (lane < kGroups) by_way()[warp()][lane * kAtOnce + e] = dskip[e];
    }
    __syncthreads();
    R sum = R(0);
    for (int v = threadIdx.x; v < kV; v += kBwdThreads) {
      R value = R(0);
      for (int warp = 0; warp < Cut::kWarps; ++warp) value += by_way()[warp][v];
      if (p.skip_v != 0 && column + v < p.size)
        store(in_workspace<R>(w.dskip) + (place.walk / plan.tiles * p.value_heads + place.hv) * p.size + column + v,
              value);
      sum += value;
    }
    sum = block_total(sum);
    if (p.skip_v == 0 && threadIdx.x == 0) store(in_workspace<R>(w.dskip) + head, sum);
  }
};

}  // namespace seqkern::linear_attention::cuda

// What forward and backward do with a chunk: up to kTokens consecutive tokens of one sequence, counted from its start.
// Token i of a chunk is processing time chunk.begin + i; rows of tiles beyond chunk.count are zero.
#pragma once

#include <type_traits>

#include "common/async.cuh"
#include "common/grid.cuh"
#include "common/math.cuh"
#include "common/matmul.cuh"
#include "common/reduce.cuh"
#include "common/sequences.cuh"
#include "linear_attention/params.h"

namespace seqkern::linear_attention::cuda {

template <typename R>
inline constexpr R kInfinity = static_cast<R>(__builtin_huge_val());

// --- time

// What a block walks: a batch row, a sequence of cu_seqlens, or a segment of one.
struct Stretch {
  int64_t b, begin, end;
  int64_t state;     // row of states
  bool first, last;  // of the segments
};

template <int kTokens>
__device__ __forceinline__ Stretch stretch_of(const Sequences& s, int64_t row, int64_t segment, int64_t segments) {
  const Span span = s.cu_seqlens ? packed_span(s, row) : Span{0, s.length, row, false};
  const int64_t chunks = divide(span.end - span.begin + kTokens - 1, kTokens).quotient;
  const int64_t step = divide(chunks + segments - 1, segments).quotient * kTokens;
  return {s.cu_seqlens ? 0 : row,
          min(span.begin + segment * step, span.end),
          min(span.begin + (segment + 1) * step, span.end),
          row,
          segment == 0,
          segment + 1 == segments};
}

struct Chunk {
  int64_t begin;
  int count;
  bool starts;   // a sequence of seq_idx, so that the state before it is none of its own
  bool padding;  // tokens of no sequence
};

// The chunk that begins at tau, which is a multiple of kTokens from its sequence's start. All lanes take part.
template <int kTokens>
__device__ __forceinline__ Chunk chunk_at(const Sequences& s, const Stretch& stretch, int64_t tau) {
  Chunk chunk{tau, static_cast<int>(min(stretch.end - tau, int64_t{kTokens})), false, false};
  if (!s.seq_idx) return chunk;
  const int32_t id = sequence_id(s, stretch.b, tau);
  chunk.padding = id < 0;
  chunk.starts = tau == 0 || sequence_id(s, stretch.b, tau - 1) != id;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
  for (int i = 0; i < chunk.count; i += kWarpSize) {
    const bool same = i + lane < chunk.count && sequence_id(s, stretch.b, tau + i + lane) == id;
    const uint32_t others = ~__ballot_sync(0xffffffffu, same);
    if (others != 0) chunk.count = min(chunk.count, i + __ffs(others) - 1);
  }
  return chunk;
}

// --- tensors

// Where the elements of a head's tokens lie: token i of a chunk at `first + i step`.
struct Rows {
  int64_t first, step;

  __device__ __forceinline__ Rows(const Data& x, const Sequences& s, int64_t b, int64_t tau, int64_t h)
      : first(b * x.b + memory_place(s, tau) * x.l + h * x.h), step(s.reverse ? -x.l : x.l) {}
  __device__ __forceinline__ int64_t operator[](int i) const { return first + i * step; }
};

__device__ __forceinline__ Array array_of(const Data& x) {
  return {x.data, x.dtype};
}

// f(pointer) for q, k, v, y, whose dtype follows from the operand type: fp16 data are multiplied as fp32.
template <typename T, typename F>
__device__ __forceinline__ void visit_data(const Data& x, F&& f) {
  if constexpr (sizeof(T) == 4) {
    if (x.dtype == DType::kFloat16) return f(static_cast<__half*>(x.data));
  }
  f(static_cast<T*>(x.data));
}

// Columns [column, column + kColumns) of a chunk's tokens, zero where there are none, as T. Copies of 16 bytes are left
// on their way: wait_copies<0>() and a barrier end them.
template <int kThreads, typename X, typename T, int kTokens, int kColumns>
__device__ __forceinline__ void load_rows(Matrix<T, kTokens, kColumns>& to_matrix, const X* data, const Rows& rows,
                                          int count, int64_t column, int64_t size) {
  constexpr int kVector = kVectorCount<T>, kVectors = kColumns / kVector;
  const X* first = data + rows.first + column;
  const int columns = static_cast<int>(min(size - column, int64_t{kColumns}));
  const bool aligned =
      (reinterpret_cast<uintptr_t>(first) | rows.step * sizeof(X)) % (kVector * static_cast<int>(sizeof(X))) == 0;
  if (std::is_same_v<X, T> && aligned) {
#pragma unroll 4
    for (int at = threadIdx.x; at < kTokens * kVectors; at += kThreads) {
      const int i = at / kVectors, j = at % kVectors * kVector;
      const int valid = i < count ? max(0, min(columns - j, kVector)) : 0;
      copy_async<16>(&to_matrix[i][j], valid > 0 ? first + i * rows.step + j : first,
                     valid * static_cast<int>(sizeof(X)));
    }
    return;
  }
#pragma unroll 1
  for (int at = threadIdx.x; at < kTokens * kVectors; at += kThreads) {
    const int i = at / kVectors, j = at % kVectors * kVector;
    const int valid = i < count ? columns - j : 0;
    const X* from = first + i * rows.step + j;
    Vector<X, kVector> v;
    if (aligned && valid >= kVector) {
      v = load<kVector>(from);
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e) v[e] = e < valid ? load(from + e) : to<X>(0.0f);
    }
    Vector<T, kVector> converted;
#pragma unroll
    for (int e = 0; e < kVector; ++e) converted[e] = to<T>(v[e]);
    *reinterpret_cast<Vector<T, kVector>*>(&to_matrix[i][j]) = converted;
  }
}
template <int kThreads, typename T, int kTokens, int kColumns>
__device__ __forceinline__ void load_tokens(Matrix<T, kTokens, kColumns>& to_matrix, const Data& x, const Rows& rows,
                                            int count, int64_t column, int64_t size) {
  visit_data<T>(x, [&](const auto* data) { load_rows<kThreads>(to_matrix, data, rows, count, column, size); });
}

// Two neighbouring elements at `at`, of which `valid` exist; `even`: rows are whole pairs, so that both go at once.
template <typename X, typename R>
__device__ __forceinline__ void store_pair(X* data, int64_t at, int64_t valid, bool even, R left, R right) {
  if (even && valid >= 2) return store(data + at, Vector<X, 2>{{to<X>(left), to<X>(right)}});
  if (valid > 0) store(data + at, to<X>(left));
  if (valid > 1) store(data + at + 1, to<X>(right));
}
template <typename X>
__device__ __forceinline__ bool whole_pairs(const X* data, const Rows& rows) {
  return ((reinterpret_cast<uintptr_t>(data) / sizeof(X) | rows.first | rows.step) & 1) == 0;
}

// The place of S(key, value) in the state of a row and head.
struct StatePlace {
  int64_t first, key, value;  // offset and strides

  __device__ __forceinline__ StatePlace(const Inputs& in, int64_t row, int64_t h)
      : first((row * in.value_heads + h) * in.keys * in.size),
        key(in.value_major ? 1 : in.size),
        value(in.value_major ? in.keys : 1) {}
  __device__ __forceinline__ int64_t operator()(int64_t k, int64_t v) const { return first + k * key + v * value; }
};

// f(key, value, whether it exists, its place) for the values [column, column + kValues) of a state, neighbouring
// threads at neighbouring places.
template <int kThreads, int kKeys, int kValues, int kAtOnce, typename F>
__device__ __forceinline__ void for_each_of_state(const Inputs& in, int64_t row, int64_t h, int64_t column, F&& f) {
  const StatePlace place(in, row, h);
#pragma unroll kAtOnce
  for (int at = threadIdx.x; at < kKeys * kValues; at += kThreads) {
    const int k = in.value_major ? at % kKeys : at / kValues, v = in.value_major ? at / kKeys : at % kValues;
    f(k, v, k < in.keys && column + v < in.size, place(k, column + v));
  }
}

// A product from or to a state, by way of shared memory that all threads of the block write and read here.
template <int kThreads, typename P, typename R, int kKeys, int kValues>
__device__ __forceinline__ void load_state(P& S, Matrix<R, kKeys, kValues>& by_way, const Array& from, const Inputs& in,
                                           int64_t row, int64_t h, int64_t column) {
  __syncthreads();
  for_each_of_state<kThreads, kKeys, kValues, 2>(in, row, h, column, [&](int k, int v, bool exists, int64_t at) {
    by_way[k][v] = exists ? load<R>(from, at) : R(0);
  });
  __syncthreads();
  int i = 0;
  S.for_each([&](int k, int v, R& s) {
    if (i++ % 16 == 0) __syncwarp();  // bounds the loads on their way, and so the registers
    s = by_way[k][v];
  });
  __syncthreads();
}
template <int kThreads, typename P, typename R, int kKeys, int kValues>
__device__ __forceinline__ void store_state(P& S, Matrix<R, kKeys, kValues>& by_way, const Array& to_state,
                                            const Inputs& in, int64_t row, int64_t h, int64_t column) {
  __syncthreads();
  S.for_each([&](int k, int v, R& s) { by_way[k][v] = s; });
  __syncthreads();
  R* data = static_cast<R*>(to_state.data);
  for_each_of_state<kThreads, kKeys, kValues, 1>(in, row, h, column, [&](int k, int v, bool exists, int64_t at) {
    if (exists) store(data + at, by_way[k][v]);
  });
}

// --- gates of a head: one number per token

template <typename T, typename R>
__device__ __forceinline__ R exp_of(R x) {
  if constexpr (sizeof(T) == 2)
    return __expf(x);
  else if constexpr (sizeof(T) == 4)
    return expf(x);
  else
    return exp(x);
}

// The largest log decay whose exponential is 0, as -inf has it: sums of such numbers stay finite. NaN stays NaN.
template <typename R>
inline constexpr R kVanished = sizeof(R) == 4 ? R(-104) : R(-750);
template <typename R>
__device__ __forceinline__ R clamp_decay(R g) {
  return g < kVanished<R> ? kVanished<R> : g;
}

// A sum of log decays in two parts, whose differences keep the precision of R.
template <typename R>
struct LongSum {
  R high, low;

  __device__ __forceinline__ LongSum operator+(const LongSum& other) const {
    const R sum = high + other.high, of_other = sum - high;
    const R error = (high - (sum - of_other)) + (other.high - of_other);
    return {sum, low + other.low + error};
  }
  __device__ __forceinline__ R operator-(const LongSum& other) const { return (high - other.high) + (low - other.low); }
};

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
        x.g = empty ? R(0) : clamp_decay(kept - m);
        x.w = empty ? R(0) : exp_of<T>(entered - m);
      }
      forget += warp_sum(x.f);
    }
    LongSum<R> own{x.g, R(0)};
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const LongSum<R> other{__shfl_up_sync(kAll, own.high, distance), __shfl_up_sync(kAll, own.low, distance)};
      if (lane >= distance) own = other + own;
    }
    const LongSum<R> other{__shfl_up_sync(kAll, own.high, 1), __shfl_up_sync(kAll, own.low, 1)};
    const LongSum<R> before = lane == 0 ? sum : sum + other, c = sum + own;
    sum = {__shfl_sync(kAll, c.high, kWarpSize - 1), __shfl_sync(kAll, c.low, kWarpSize - 1)};
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

// --- gates per key

// exp(g) of a chunk's tokens, 1 where there is no token or key.
template <int kThreads, typename T, typename R, int kTokens, int kKeys>
__device__ __forceinline__ void load_key_decays(Matrix<R, kTokens, kKeys>& a, const Inputs& in, int64_t b, int64_t h,
                                                const Chunk& chunk) {
  const Rows rows(in.gates.decay, in.sequences, b, chunk.begin, h);
  visit(array_of(in.gates.decay), [&](const auto* data) {
#pragma unroll 4
    for (int at = threadIdx.x; at < kTokens * kKeys; at += kThreads) {
      const int i = at / kKeys, k = at % kKeys;
      a[i][k] = i < chunk.count && k < in.keys ? exp_of<T>(to<R>(load(data + rows[i] + k))) : R(1);
    }
  });
}

// [scores] with a decay per key, by doubling. Of two neighbouring blocks of `half` tokens, those of the later read
// those of the earlier, and exp(r_i - c_j) = (from the middle to i) (from behind j to the middle): both factors are
// products of decays, so at most 1 whatever the decays are. As blocks grow, q is multiplied up from its block's start
// and k up to its block's end; those of the whole chunk are what [chunk] and [carry] read.
//
//   P      (tokens, tokens), zero; gets P_ij of j < i
//   q, k   become exp(r_i) * q_i and exp(c_C - c_j) * k_j
//   current  r_i = c_i, not c_{i-1}
//   a      exp(g); row 0 becomes exp(c_C), the others are used up
template <int kThreads, typename P, typename T, typename R, int kTokens, int kKeys>
__device__ __forceinline__ void key_scores(P& scores, Matrix<T, kTokens, kKeys>& q, Matrix<T, kTokens, kKeys>& k,
                                           Matrix<R, kTokens, kKeys>& a, int depth, bool current, bool exact) {
  static_assert(P::kRows == 16 && P::kColumns <= 16,
                "the smallest tiles, each of one level or of those within 16 tokens");
  const auto for_each_key = [&](auto&& f) {
#pragma unroll 2
    for (int at = threadIdx.x; at < kTokens * kKeys; at += kThreads) f(at / kKeys, at % kKeys);
  };
  const auto scale = [](T& x, R factor) { x = to<T>(to<R>(x) * factor); };
  if (current) for_each_key([&](int i, int key) { scale(q[i][key], a[i][key]); });
  __syncthreads();
#pragma unroll 1
  for (int half = 1; half < kTokens; half *= 2) {
    const int row = P::first_row() / max(half, 16), column = P::first_column() / max(half, 16);
    if (half < 16 ? row == column : row % 2 == 1 && row == column + 1) {  // this warp's tile has such pairs
      P level;
      level.clear();
      level.template add<kPlain, kTransposed>(q, k, 0, depth, exact);
      scores.for_each_with(level, [&](int i, int j, R& sum, R of_level) {
        if (i / half % 2 == 1 && i / half == j / half + 1) sum = of_level;
      });
    }
    __syncthreads();
    for_each_key([&](int i, int key) {
      const int block = i / half;
      if (block % 2 == 1)
        scale(q[i][key], a[(block - 1) * half][key]);
      else
        scale(k[i][key], a[(block + 1) * half][key]);
    });
    __syncthreads();
#pragma unroll 2
    for (int at = threadIdx.x; at < kTokens / (2 * half) * kKeys; at += kThreads) {
      const int first = at / kKeys * 2 * half, key = at % kKeys;
      a[first][key] *= a[first + half][key];
    }
  }
  __syncthreads();
}

// What key_scores leaves in k and in row 0 of a, without the scores.
template <typename T, typename R, int kTokens, int kKeys>
__device__ __forceinline__ void carry_keys(Matrix<T, kTokens, kKeys>& k, Matrix<R, kTokens, kKeys>& a) {
  const int key = threadIdx.x;
  if (key >= kKeys) return;
  R after = R(1);
#pragma unroll 4
  for (int j = kTokens - 1; j >= 0; --j) {
    k[j][key] = to<T>(to<R>(k[j][key]) * after);
    after *= a[j][key];
  }
  a[0][key] = after;
}

}  // namespace seqkern::linear_attention::cuda

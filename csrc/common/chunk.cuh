// Chunks of matrix-valued recurrences: up to kTokens consecutive tokens of one sequence, counted from its start. Which
// tokens they are, their tensors and states in shared memory, and products of decays of which no factor exceeds 1.
// Token i of a chunk is processing time chunk.begin + i; rows of tiles beyond chunk.count are zero.
#pragma once

#include <type_traits>

#include "common/async.cuh"
#include "common/grid.cuh"
#include "common/math.cuh"
#include "common/matmul.cuh"
#include "common/reduce.cuh"
#include "common/sequences.cuh"
#include "common/tokens.h"

namespace seqkern {

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

  __device__ __forceinline__ Rows(const TokenData& x, const Sequences& s, int64_t b, int64_t tau, int64_t h)
      : first(b * x.b + memory_place(s, tau) * x.l + h * x.h), step(s.reverse ? -x.l : x.l) {}
  __device__ __forceinline__ int64_t operator[](int i) const { return first + i * step; }
};

__device__ __forceinline__ Array array_of(const TokenData& x) {
  return {x.data, x.dtype};
}

// f(pointer) for q, k, v, y, whose dtype follows from the operand type: fp16 data are multiplied as fp32.
template <typename T, typename F>
__device__ __forceinline__ void visit_data(const TokenData& x, F&& f) {
  if constexpr (sizeof(T) == 4) {
    if (x.dtype == DType::kFloat16) return f(static_cast<__half*>(x.data));
  }
  f(static_cast<T*>(x.data));
}

// Columns [column, column + kColumns) of a chunk's tokens, zero where there are none, as T. Copies of 16 bytes are left
// on their way: wait_copies<0>() and a barrier end them. What kAtOnce copies need may stay in registers between calls.
template <int kThreads, int kAtOnce = 4, typename X, typename T, int kTokens, int kColumns>
__device__ __forceinline__ void load_rows(Matrix<T, kTokens, kColumns>& to_matrix, const X* data, const Rows& rows,
                                          int count, int64_t column, int64_t size) {
  constexpr int kVector = kVectorCount<T>, kVectors = kColumns / kVector;
  const X* first = data + rows.first + column;
  const int columns = static_cast<int>(min(size - column, int64_t{kColumns}));
  const bool aligned =
      (reinterpret_cast<uintptr_t>(first) | rows.step * sizeof(X)) % (kVector * static_cast<int>(sizeof(X))) == 0;
  if (std::is_same_v<X, T> && aligned) {
#pragma unroll kAtOnce
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
template <int kThreads, int kAtOnce = 4, typename T, int kTokens, int kColumns>
__device__ __forceinline__ void load_tokens(Matrix<T, kTokens, kColumns>& to_matrix, const TokenData& x,
                                            const Rows& rows, int count, int64_t column, int64_t size) {
  visit_data<T>(x, [&](const auto* data) { load_rows<kThreads, kAtOnce>(to_matrix, data, rows, count, column, size); });
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

// States (rows, heads, keys, size), or (rows, heads, size, keys) with value_major; contiguous.
struct StateShape {
  int64_t heads, keys, size;
  bool value_major;
};

// The place of S(key, value) in the state of a row and head.
struct StatePlace {
  int64_t first, key, value;  // offset and strides

  __device__ __forceinline__ StatePlace(const StateShape& shape, int64_t row, int64_t h)
      : first((row * shape.heads + h) * shape.keys * shape.size),
        key(shape.value_major ? 1 : shape.size),
        value(shape.value_major ? shape.keys : 1) {}
  __device__ __forceinline__ int64_t operator()(int64_t k, int64_t v) const { return first + k * key + v * value; }
};

// f(key, value, whether it exists, its place) for the values [column, column + kValues) of a state, neighbouring
// threads at neighbouring places.
template <int kThreads, int kKeys, int kValues, int kAtOnce, typename F>
__device__ __forceinline__ void for_each_of_state(const StateShape& shape, int64_t row, int64_t h, int64_t column,
                                                  F&& f) {
  const StatePlace place(shape, row, h);
#pragma unroll kAtOnce
  for (int at = threadIdx.x; at < kKeys * kValues; at += kThreads) {
    const int k = shape.value_major ? at % kKeys : at / kValues, v = shape.value_major ? at / kKeys : at % kValues;
    f(k, v, k < shape.keys && column + v < shape.size, place(k, column + v));
  }
}

// A product from or to a state, by way of shared memory that all threads of the block write and read here.
template <int kThreads, typename P, typename R, int kKeys, int kValues>
__device__ __forceinline__ void load_state(P& S, Matrix<R, kKeys, kValues>& by_way, const Array& from,
                                           const StateShape& shape, int64_t row, int64_t h, int64_t column) {
  __syncthreads();
  for_each_of_state<kThreads, kKeys, kValues, 2>(shape, row, h, column, [&](int k, int v, bool exists, int64_t at) {
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
                                            const StateShape& shape, int64_t row, int64_t h, int64_t column) {
  __syncthreads();
  S.for_each([&](int k, int v, R& s) { by_way[k][v] = s; });
  __syncthreads();
  R* data = static_cast<R*>(to_state.data);
  for_each_of_state<kThreads, kKeys, kValues, 1>(shape, row, h, column, [&](int k, int v, bool exists, int64_t at) {
    if (exists) store(data + at, by_way[k][v]);
  });
}

// --- log decays

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

// The sums of log decays before and through the token of each lane.
template <typename R>
struct RunningSums {
  LongSum<R> before, through;
};
// g is that of each lane's token, `sum` that of all tokens before those of the warp; it becomes that of all through
// them.
template <typename R>
__device__ __forceinline__ RunningSums<R> running_sums(R g, LongSum<R>& sum) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % kWarpSize;
  LongSum<R> own{g, R(0)};
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const LongSum<R> other{__shfl_up_sync(kAll, own.high, distance), __shfl_up_sync(kAll, own.low, distance)};
    if (lane >= distance) own = other + own;
  }
  const LongSum<R> other{__shfl_up_sync(kAll, own.high, 1), __shfl_up_sync(kAll, own.low, 1)};
  const RunningSums<R> sums{lane == 0 ? sum : sum + other, sum + own};
  sum = {__shfl_sync(kAll, sums.through.high, kWarpSize - 1), __shfl_sync(kAll, sums.through.low, kWarpSize - 1)};
  return sums;
}

// --- decays per key

// exp(g) of a chunk's tokens for keys [column, column + kKeys), 1 where there is no token or key.
template <int kThreads, typename T, typename R, int kTokens, int kKeys>
__device__ __forceinline__ void load_key_decays(Matrix<R, kTokens, kKeys>& a, const TokenData& decay, const Rows& rows,
                                                int count, int64_t column, int64_t size) {
  visit(array_of(decay), [&]<typename X>(const X* data) {
    [[maybe_unused]] constexpr int kAtOnce = std::is_same_v<X, R> ? 4 : sizeof(X) == 2 ? 2 : 1;
#pragma unroll kAtOnce
    for (int at = threadIdx.x; at < kTokens * kKeys; at += kThreads) {
      const int i = at / kKeys, k = at % kKeys;
      const bool exists = i < count && column + k < size;
      a[i][k] = exists ? exp_of<T>(to<R>(load(data + rows[i] + column + k))) : R(1);
    }
  });
}

// A side of scores with decays per key: the rows that read, and the scores that they get.
template <typename P, typename M>
struct KeyReader {
  P& scores;
  M& rows;
};

// [scores] with a decay per key, by doubling. Of two neighbouring blocks of `half` tokens, those of the later read
// those of the earlier, and exp(r_i - c_j) = (from the middle to i) (from behind j to the middle): both factors are
// products of decays, so at most 1 whatever the decays are. As blocks grow, q is multiplied up from its block's start
// and k up to its block's end; those of the whole chunk are what [chunk] and [carry] read.
//
//   k        becomes exp(c_C - c_j) * k_j
//   a        exp(g); row 0 becomes exp(c_C), the others are used up
//   current  r_i = c_i, not c_{i-1}
//   readers  rows q_i become exp(r_i) * q_i; to the scores P (tokens, tokens) is added P_ij of j < i
template <int kThreads, typename T, typename R, int kTokens, int kKeys, typename P, typename M, typename... Readers>
__device__ __forceinline__ void key_scores(Matrix<T, kTokens, kKeys>& k, Matrix<R, kTokens, kKeys>& a, int depth,
                                           bool current, bool exact, KeyReader<P, M> reader, Readers... others) {
  static_assert(P::kRows == 16 && P::kColumns <= 16,
                "the smallest tiles, each of one level or of those within 16 tokens");
  const auto for_each_key = [&](auto&& f) {
#pragma unroll 2
    for (int at = threadIdx.x; at < kTokens * kKeys; at += kThreads) f(at / kKeys, at % kKeys);
  };
  const auto scale = [](T& x, R factor) { x = to<T>(to<R>(x) * factor); };
  const auto scale_readers = [&](int i, int key, R factor) {
    scale(reader.rows[i][key], factor);
    (scale(others.rows[i][key], factor), ...);
  };
  if (current) for_each_key([&](int i, int key) { scale_readers(i, key, a[i][key]); });
  __syncthreads();
#pragma unroll 1
  for (int half = 1; half < kTokens; half *= 2) {
    const int row = P::first_row() / max(half, 16), column = P::first_column() / max(half, 16);
    if (half < 16 ? row == column : row % 2 == 1 && row == column + 1) {  // this warp's tile has such pairs
      const auto add = [&](auto& of) {
        P level;
        level.clear();
        level.template add<kPlain, kTransposed>(of.rows, k, 0, depth, exact);
        of.scores.for_each_with(level, [&](int i, int j, R& sum, R of_level) {
          if (i / half % 2 == 1 && i / half == j / half + 1) sum += of_level;
        });
      };
      add(reader);
      (add(others), ...);
    }
    __syncthreads();
    for_each_key([&](int i, int key) {
      const int block = i / half;
      if (block % 2 == 1)
        scale_readers(i, key, a[(block - 1) * half][key]);
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

}  // namespace seqkern

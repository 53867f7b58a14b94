// What forward and backward know of a chunk besides its tokens (common/chunk.cuh): where it lies in the workspace, and
// what the scores' kernel has left there.
#pragma once

#include "common/chunk.cuh"
#include "delta_rule/tile.h"

namespace seqkern::delta_rule::cuda {

__device__ __forceinline__ StateShape state_shape(const Inputs& in) {
  return {in.value_heads, in.keys, in.size, false};
}

// Tokens of fp16 data are exact in tf32.
__device__ __forceinline__ bool is_exact(const Inputs& in) {
  return in.q.dtype != DType::kFloat16;
}

// The rows of e: those of k where no erase key is given.
__device__ __forceinline__ const Data& erase_of(const Inputs& in) {
  return in.erase ? in.erase : in.k;
}

// Of the tokens of a chunk and a value head.
template <typename R, int kTokens>
struct alignas(16) TokenFactors {
  LongSum<R> c[kTokens];               // c_i; 0 where decays are per key
  R read[kTokens];                     // exp(c_i); 1 where decays are per key, as carry and total
  R carry[kTokens];                    // exp(c_C - c_j)
  R beta[kTokens];                     // 0 where there is no token
  R q_norm[kTokens], k_norm[kTokens];  // what q and k are multiplied by: 1 unless they are normalized
  R total;                             // exp(c_C)
};

template <int kThreads, typename R, int kTokens>
__device__ __forceinline__ void copy_factors(TokenFactors<R, kTokens>& to_factors,
                                             const TokenFactors<R, kTokens>& from) {
  constexpr int kNumbers = sizeof(TokenFactors<R, kTokens>) / sizeof(R);
  R* const to_numbers = reinterpret_cast<R*>(&to_factors);
  const R* const numbers = reinterpret_cast<const R*>(&from);
  for (int i = threadIdx.x; i < kNumbers; i += kThreads) to_numbers[i] = numbers[i];
}

// What the scores' kernel says of a chunk and a value head.
template <typename T, int kTokens>
struct ChunkRecord {
  using R = Accumulator<T>;
  R inverse[kTokens][kTokens];  // (I + diag(beta) A)^-1, with zeros above the diagonal
  T P[kTokens][kTokens];        // P_ij, 0 for j > i; without `scale`
  TokenFactors<R, kTokens> factors;
};

// The slot of a row's first chunk; those of its further ones follow.
template <int kTokens>
__device__ __forceinline__ int64_t first_slot(const Sequences& s, int64_t row) {
  if (s.cu_seqlens) return divide(sequence_start(s, row), kTokens).quotient + row;
  return row * divide(s.length + kTokens - 1, kTokens).quotient;
}

// The chunk of a slot: its row (batch row, or sequence of cu_seqlens), and its tokens; count 0 where there is none.
struct SlotChunk {
  int64_t b, row;
  Chunk chunk;
};
template <int kTokens>
__device__ __forceinline__ SlotChunk chunk_of_slot(const Sequences& s, int64_t slot) {
  int64_t row;
  if (s.cu_seqlens) {
    int64_t low = 0, high = s.count;  // rows before `low` have their first slot at or before this one
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (first_slot<kTokens>(s, middle) <= slot)
        low = middle + 1;
      else
        high = middle;
    }
    row = low - 1;
  } else {
    row = divide(slot, divide(s.length + kTokens - 1, kTokens).quotient).quotient;
  }
  if (row < 0) return {0, 0, {}};
  const Span span = s.cu_seqlens ? packed_span(s, row) : Span{0, s.length, row, false};
  const int64_t begin = span.begin + (slot - first_slot<kTokens>(s, row)) * kTokens;
  const int64_t count = clamp(span.end - begin, 0, kTokens);
  return {s.cu_seqlens ? 0 : row, row, {begin, static_cast<int>(count), false, false}};
}

// What the scores' kernel left in the workspace.
template <typename T, int kTokens>
struct Scores {
  using R = Accumulator<T>;
  using Record = ChunkRecord<T, kTokens>;

  unsigned char* workspace;
  int64_t value_heads, keys, length;
  const ScoresPlan& plan;

  __device__ __forceinline__ Scores(const Inputs& in, void* workspace_, const ScoresPlan& plan_)
      : workspace(static_cast<unsigned char*>(workspace_)),
        value_heads(in.value_heads),
        keys(in.keys),
        length(in.sequences.length),
        plan(plan_) {}

  __device__ __forceinline__ Record& record(int64_t slot, int64_t hv) const {
    return reinterpret_cast<Record*>(workspace + plan.records)[slot * value_heads + hv];
  }
  // (kTokens, kTokens)
  __device__ __forceinline__ R* A(int64_t slot, int64_t hv) const {
    return reinterpret_cast<R*>(workspace + plan.A) + (slot * value_heads + hv) * kTokens * kTokens;
  }
  // (K,); decays per key
  __device__ __forceinline__ R* total(int64_t slot, int64_t hv) const {
    return reinterpret_cast<R*>(workspace + plan.total) + (slot * value_heads + hv) * keys;
  }
  // (B, L, HV, K), multiplied by decays and norms; decays per key
  __device__ __forceinline__ Data q() const { return rows(plan.q); }
  __device__ __forceinline__ Data erase() const { return rows(plan.erase); }
  __device__ __forceinline__ Data k() const { return rows(plan.k); }

 private:
  __device__ __forceinline__ Data rows(int64_t at) const {
    return {workspace + at, kDType<T>, length * value_heads * keys, value_heads * keys, keys};
  }
};

// Copies from what the scores' kernel left, which are on their way: wait_copies() and a barrier end them.
template <int kThreads, typename X, int kTokens>
__device__ __forceinline__ void load_pairs(Matrix<X, kTokens, kTokens>& to_matrix, const X (&from)[kTokens][kTokens]) {
  constexpr int kVector = kVectorCount<X>, kVectors = kTokens / kVector;
#pragma unroll 1
  for (int at = threadIdx.x; at < kTokens * kVectors; at += kThreads) {
    const int i = at / kVectors, j = at % kVectors * kVector;
    copy_async<16>(&to_matrix[i][j], &from[i][j]);
  }
}
template <int kThreads, typename R, int kTokens>
__device__ __forceinline__ void load_factors(TokenFactors<R, kTokens>& to_factors,
                                             const TokenFactors<R, kTokens>& from) {
  constexpr int kPieces = sizeof(TokenFactors<R, kTokens>) / 16;
  static_assert(kPieces <= kThreads);
  const int at = threadIdx.x * 16;
  if (threadIdx.x < kPieces)
    copy_async<16>(reinterpret_cast<char*>(&to_factors) + at, reinterpret_cast<const char*>(&from) + at);
}

// --- segments

// Where a state meets the transition of a segment: the state, and some columns of the transition.
template <typename R, int kKeys, int kValues>
struct FoldRoom {
  static constexpr int kColumns = kValues < 16 ? kValues : 16;
  Matrix<R, kKeys, kValues> state;
  Matrix<R, kKeys, kColumns> transition;
};

// The state goes through a segment that other blocks have summarized: S = M S + own. The columns of M (kKeys, keys)
// that there are in whole tiles of values lie in rows `row` apart; own (kKeys, kValues) in the order of threads.
template <int kThreads, typename P, typename R, int kKeys, int kValues>
__device__ __forceinline__ void fold(P& S, FoldRoom<R, kKeys, kValues>& room, const R* M, int64_t row, const R* own,
                                     int64_t keys) {
  using Room = FoldRoom<R, kKeys, kValues>;
  constexpr int kVector = kVectorCount<R>, kVectors = Room::kColumns / kVector;
  __syncthreads();
  S.for_each([&](int key, int v, R& s) { room.state[key][v] = s; });
  BlockProduct<R, kKeys, kValues, kThreads / kWarpSize> sum;
  static_assert(sizeof(sum) == sizeof(S) && sum.kRows == P::kRows, "cut alike");
  own += threadIdx.x;
  int i = 0;
  sum.for_each([&](int, int, R& s) {
    if (i++ % 8 == 0) __syncwarp();  // bounds the loads on their way, and so the registers
    s = load(own), own += kThreads;
  });
#pragma unroll 1
  for (int first = 0; first < keys; first += Room::kColumns) {
    __syncthreads();
#pragma unroll 1
    for (int at = threadIdx.x; at < kKeys * kVectors; at += kThreads) {
      const int key = at / kVectors, j = at % kVectors * kVector;
      copy_async<16>(&room.transition[key][j], M + key * row + first + j);
    }
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    const Part<Matrix<R, kKeys, kValues>> rows{room.state, first, 0};
    sum.template add<kPlain, kPlain>(room.transition, rows, 0, Room::kColumns);
  }
  const R* of_sum = &sum.value[0][0][0];
  S.for_each([&](int, int, R& s) { s = *of_sum++; });
  __syncthreads();
}

}  // namespace seqkern::delta_rule::cuda

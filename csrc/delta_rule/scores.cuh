// A block of the scores' kernel: what the tokens of a chunk and a value head say of each other.
#pragma once

#include "delta_rule/chunk.cuh"

namespace seqkern::delta_rule::cuda {

template <typename T, int kTokens, bool kPerKey>
struct ScoresShared {
  using R = Accumulator<T>;
  Matrix<T, kTokens, kSlab> q, erase, k;  // some keys
  Matrix<R, kPerKey ? kTokens : 1, kPerKey ? kSlab : 1> decays;
  Matrix<R, kTokens, kTokens> system, inverse;  // diag(beta) A, (I + diag(beta) A)^-1
  Matrix<R, kTokens / 2, kTokens / 2> between;
  TokenFactors<R, kTokens> factors;
};

// f(pointer) for q, k, e, which the scores of decays per key take in fp32 whatever they are: decays are multiplied in.
template <typename T, bool kPerKey, typename F>
__device__ __forceinline__ void visit_rows(const Data& x, F&& f) {
  if constexpr (kPerKey && sizeof(T) == 4) {
    if (x.dtype == DType::kBFloat16) return f(static_cast<__nv_bfloat16*>(x.data));
  }
  visit_data<T>(x, f);
}

// T is what the products are taken in.
template <typename T, int kTokens, bool kPerKey>
struct ScoresBlock {
  using R = Accumulator<T>;
  static constexpr int kWarps = kScoresThreads / kWarpSize;
  using Pairs = BlockProduct<T, kTokens, kTokens, kWarps>;

  const Inputs& in;
  ScoresShared<T, kTokens, kPerKey>& shared;
  const SlotChunk& at;
  const int64_t slot, hv, h;

  __device__ __forceinline__ Rows rows(const Data& x, int64_t head) const {
    return Rows(x, in.sequences, at.b, at.chunk.begin, head);
  }
  // Of e_i, where e is k.
  __device__ __forceinline__ R erase_norm(int i) const { return in.erase ? R(1) : shared.factors.k_norm[i]; }

  // [decay] and beta, by one warp
  __device__ __forceinline__ void take_factors() {
    const int lane = threadIdx.x % kWarpSize;
    const bool decays = in.form == Decay::kToken, exists = lane < at.chunk.count;
    TokenFactors<R, kTokens>& factors = shared.factors;
    const R g = decays && exists ? clamp_decay(load<R>(array_of(in.decay), rows(in.decay, hv)[lane])) : R(0);
    LongSum<R> sum{R(0), R(0)};
    const LongSum<R> c = running_sums(g, sum).through;
    if (lane == 0) factors.total = exp_of<R>(sum.high + sum.low);
    if (lane >= kTokens) return;
    factors.c[lane] = c, factors.read[lane] = exp_of<R>(c.high + c.low), factors.carry[lane] = exp_of<R>(sum - c);
    factors.beta[lane] = exists ? load<R>(array_of(in.beta), rows(in.beta, hv)[lane]) : R(0);
  }

  // [norm]
  __device__ __forceinline__ void take_norms() {
    const int lane = threadIdx.x % kWarpSize;
    const auto norm_of = [&](const Data& x, int i) {
      R sum = R(0);
      if (i < at.chunk.count) {
        visit_rows<T, kPerKey>(x, [&](const auto* data) {
          const auto* row = data + rows(x, h)[i];
#pragma unroll 4
          for (int64_t key = lane; key < in.keys; key += kWarpSize) {
            const R value = to<R>(load(row + key));
            sum = fma(value, value, sum);
          }
        });
      }
      return R(1) / sqrt(warp_sum(sum) + static_cast<R>(kNormEps));
    };
#pragma unroll 1
    for (int i = threadIdx.x / kWarpSize; i < kTokens; i += kWarps) {
      const R q_norm = in.normalize ? norm_of(in.q, i) : R(1), k_norm = in.normalize ? norm_of(in.k, i) : R(1);
      if (lane == 0) shared.factors.q_norm[i] = q_norm, shared.factors.k_norm[i] = k_norm;
    }
  }

  // q, e, k of the keys from `column` on.
  __device__ __forceinline__ void load_slab(int64_t column) {
#pragma unroll 1
    for (int which = 0; which < (kPerKey || in.erase ? 3 : 2); ++which) {
      const Data& x = which == 0 ? in.q : which == 1 ? in.k : erase_of(in);
      auto& to_matrix = which == 0 ? shared.q : which == 1 ? shared.k : shared.erase;
      visit_rows<T, kPerKey>(x, [&](const auto* data) {
        load_rows<kScoresThreads, 2>(to_matrix, data, rows(x, h), at.chunk.count, column, in.keys);
      });
    }
    commit_copies();
    if constexpr (kPerKey) {
      load_key_decays<kScoresThreads, R>(shared.decays, in.decay, rows(in.decay, hv), at.chunk.count, column, in.keys);
    }
    wait_copies<0>();
    __syncthreads();
  }

  // [scores] of a slab's keys are added, without norms, and without the decays of tokens.
  __device__ __forceinline__ void add_slab(Pairs& P, Pairs& A, int depth) {
    if constexpr (kPerKey) {
      Pairs own;
      own.clear();
      own.template add<kPlain, kTransposed>(shared.q, shared.k, 0, depth);
      P.for_each_with(own, [](int i, int j, R& sum, R product) { sum += i == j ? product : R(0); });
      __syncthreads();
      key_scores<kScoresThreads>(shared.k, shared.decays, depth, true, true, KeyReader{P, shared.q},
                                 KeyReader{A, shared.erase});
    } else {
      P.template add<kPlain, kTransposed>(shared.q, shared.k, 0, depth, is_exact(in));
      A.template add<kPlain, kTransposed>(in.erase ? shared.erase : shared.k, shared.k, 0, depth, is_exact(in));
    }
  }

  // Norms and the decays of tokens are multiplied in.
  __device__ __forceinline__ void finish(Pairs& P, Pairs& A) {
    const TokenFactors<R, kTokens>& factors = shared.factors;
    P.for_each([&](int i, int j, R& sum) {
      const R factor = factors.q_norm[i] * factors.k_norm[j];
      sum = j <= i ? sum * factor * exp_of<R>(factors.c[i] - factors.c[j]) : R(0);
    });
    A.for_each([&](int i, int j, R& sum) {
      const R factor = erase_norm(i) * factors.k_norm[j];
      sum = j < i ? sum * factor * exp_of<R>(factors.c[i] - factors.c[j]) : R(0);
      shared.system[i][j] = factors.beta[i] * sum;
    });
  }

  // [solve] the inverse: blocks of 16 tokens on the diagonal by substitution, a lane for each column; then what lies
  // between two of them.
  __device__ __forceinline__ void invert() {
    constexpr int kBlock = 16;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    if (warp < kTokens / kBlock && lane < kBlock) {
      const Part<Matrix<R, kTokens, kTokens>> system{shared.system, warp * kBlock, warp * kBlock};
      R x[kBlock];
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        x[i] = i == lane ? R(1) : R(0);
#pragma unroll
        for (int j = 0; j < i; ++j) x[i] = fma(-system[i][j], x[j], x[i]);
        shared.inverse[warp * kBlock + i][warp * kBlock + lane] = x[i];
      }
    }
    if constexpr (kTokens == 2 * kBlock) {
      using Blocks = Product<R, kBlock, kBlock, 1, 2>;
      const Part<Matrix<R, kTokens, kTokens>> first{shared.inverse, 0, 0}, second{shared.inverse, kBlock, kBlock},
          system{shared.system, kBlock, 0};
      __syncthreads();
      Blocks product;
      product.clear();
      product.template add<kPlain, kPlain>(system, first, 0, kBlock);
      product.store(shared.between);
      __syncthreads();
      product.clear();
      product.template add<kPlain, kPlain>(second, shared.between, 0, kBlock);
      product.for_each(
          [&](int i, int j, R sum) { shared.inverse[kBlock + i][j] = -sum, shared.inverse[i][kBlock + j] = R(0); });
    }
    __syncthreads();
  }

  // What key_scores left of a slab.
  template <typename Operand>
  __device__ __forceinline__ void store_slab(const Scores<Operand, kTokens>& to_memory, int64_t column) {
    const Data q = to_memory.q(), erase = to_memory.erase(), k = to_memory.k();
    const Rows q_rows = rows(q, hv), erase_rows = rows(erase, hv), k_rows = rows(k, hv);
    const auto store_at = [&](const Data& x, int64_t place, R value) {
      store(static_cast<Operand*>(x.data) + place, to<Operand>(value));
    };
#pragma unroll 2
    for (int item = threadIdx.x; item < at.chunk.count * kSlab; item += kScoresThreads) {
      const int i = item / kSlab, key = item % kSlab;
      if (column + key >= in.keys) continue;
      store_at(q, q_rows[i] + column + key, shared.q[i][key] * shared.factors.q_norm[i]);
      store_at(erase, erase_rows[i] + column + key, shared.erase[i][key] * erase_norm(i));
      store_at(k, k_rows[i] + column + key, shared.k[i][key] * shared.factors.k_norm[i]);
    }
    if (threadIdx.x < kSlab && column + threadIdx.x < in.keys) {
      store(to_memory.total(slot, hv) + column + threadIdx.x, shared.decays[0][threadIdx.x]);
    }
  }

  template <typename Operand>
  __device__ __forceinline__ void store_record(const Scores<Operand, kTokens>& to_memory, Pairs& P, Pairs& A) {
    ChunkRecord<Operand, kTokens>& record = to_memory.record(slot, hv);
    P.for_each_pair([&](int i, int j, R left, R right) {
      store(&record.P[i][j], Vector<Operand, 2>{{to<Operand>(left), to<Operand>(right)}});
    });
    if (to_memory.plan.keeps_A) {
      R* const pairs = to_memory.A(slot, hv);
      A.for_each_pair(
          [&](int i, int j, R left, R right) { store(pairs + i * kTokens + j, Vector<R, 2>{{left, right}}); });
    }
    for (int item = threadIdx.x; item < kTokens * kTokens; item += kScoresThreads) {
      store(&record.inverse[item / kTokens][item % kTokens], shared.inverse[item / kTokens][item % kTokens]);
    }
    copy_factors<kScoresThreads>(record.factors, shared.factors);
  }
};

}  // namespace seqkern::delta_rule::cuda

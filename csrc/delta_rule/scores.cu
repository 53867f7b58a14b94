// The scores of each chunk, and the inverse of its triangular system: what needs no state, for all chunks side by side.
#include "common/launch.h"
#include "delta_rule/scores.cuh"

namespace seqkern::delta_rule::cuda {
namespace {

// [norm] [decay] [scores], and the inverse of [solve].
// block    a chunk and a value head
// warp     part of the pairs of tokens; then blocks of 16 tokens of the inverse
// shared   slabs of q, k, e, one after the other; the system and its inverse
// bytes    q, k, e once per value head, gates; a ChunkRecord per chunk, and with decays per key scaled rows
// limits   chunks x value heads < 2^31 blocks
template <typename T, int kTokens, bool kPerKey>
__global__ void __launch_bounds__(kScoresThreads, 4)
    take_scores(const __grid_constant__ Inputs in, void* const workspace, const __grid_constant__ ScoresPlan plan) {
  using Block = ScoresBlock<T, kTokens, kPerKey>;
  using Pairs = typename Block::Pairs;
  const auto [slot, hv] = divide(blockIdx.x, in.value_heads);
  const SlotChunk at = chunk_of_slot<kTokens>(in.sequences, slot);
  if (at.chunk.count == 0) return;
  const int64_t h = divide(hv, divide(in.value_heads, in.heads).quotient).quotient;
  Block block{in, shared_memory<ScoresShared<T, kTokens, kPerKey>>(), at, slot, hv, h};

  const auto with_operand = [&](auto&& f) {
    if constexpr (kPerKey && sizeof(T) == 4) {
      if (plan.operand == DType::kBFloat16) return f(Scores<__nv_bfloat16, kTokens>(in, workspace, plan));
    }
    f(Scores<T, kTokens>(in, workspace, plan));
  };
  if (threadIdx.x < kWarpSize) block.take_factors();
  block.take_norms();
  Pairs P, A;
  P.clear(), A.clear();
#pragma unroll 1
  for (int64_t column = 0; column < in.keys; column += kSlab) {
    __syncthreads();
    block.load_slab(column);
    const int depth = static_cast<int>(min(in.keys - column, int64_t{kSlab}));
    block.add_slab(P, A, (depth + kDepthStep<T> - 1) / kDepthStep<T> * kDepthStep<T>);
    if constexpr (kPerKey) {
      if (plan.keeps_rows) with_operand([&](const auto& scores) { block.store_slab(scores, column); });
    }
  }
  __syncthreads();
  block.finish(P, A);
  __syncthreads();
  block.invert();
  with_operand([&](const auto& scores) { block.store_record(scores, P, A); });
}

struct Instance {
  DType compute;
  bool per_key;
  int tokens;
  void (*kernel)(Inputs, void*, ScoresPlan);
};

template <typename T, int kTokens, bool kPerKey>
constexpr Instance instance() {
  static_assert(sizeof(ScoresShared<T, kTokens, kPerKey>) <= scores_smem_bytes(kDType<T>, kPerKey, kTokens));
  static_assert(scores_smem_bytes(kDType<T>, kPerKey, kTokens) <= kSmallestSharedBytes);
  static_assert(sizeof(ChunkRecord<T, kTokens>) == record_bytes(kDType<T>, kTokens));
  return {kDType<T>, kPerKey, kTokens, take_scores<T, kTokens, kPerKey>};
}

constexpr Instance kInstances[] = {
    instance<__nv_bfloat16, 32, false>(), instance<float, 32, false>(), instance<float, 16, false>(),
    instance<float, 32, true>(),          instance<float, 16, true>(),  instance<double, 16, false>(),
    instance<double, 16, true>(),
};
static_assert(std::size(kInstances) == kScoresKernels);

}  // namespace

void scores(const Inputs& in, void* workspace, const ScoresPlan& plan, Stream stream) {
  const DType compute = scores_in(plan.operand, plan.per_key);
  const Instance& instance = find_instance(kInstances, "delta_rule_scores", [&](const Instance& i) {
    return i.compute == compute && i.per_key == plan.per_key && i.tokens == plan.tokens;
  });
  launch({.name = "delta_rule_scores",
          .grid = {plan.blocks},
          .threads = kScoresThreads,
          .smem_bytes = plan.smem_bytes,
          .stream = stream},
         instance.kernel, in, workspace, plan);
}

}  // namespace seqkern::delta_rule::cuda

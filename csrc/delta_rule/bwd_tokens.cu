// After the walk of the backward: what is a matter of one chunk.
#include "common/launch.h"
#include "delta_rule/bwd_key.cuh"
#include "delta_rule/bwd_token.cuh"

namespace seqkern::delta_rule::cuda {
namespace {

// [dq] [de] [dk] [dbeta] [ddecay] [dnorm] of a chunk
//
// block    a chunk and a key head, with all its value heads
// thread   fragments of products; with decays per key also one key
// shared   rows of the chunk, a tile of a state, scores
// bytes    q, k, e, dO, v, w, the gradient behind the chunk; u twice, the state before the chunk twice
// limits   chunks H < 2^31 blocks, K <= kK
template <typename T, bool kPerKey, int kC, int kK, int kV, int kBlocks>
__global__ void __launch_bounds__(kBwdThreads, kBlocks)
    tokens_kernel(const __grid_constant__ BwdParams p, const __grid_constant__ BwdPlan plan) {
  using Decays = std::conditional_t<kPerKey, KeyDecays<T, kC, kK, kV>, TokenDecays<T, kC, kK, kV>>;
  Decays(p, plan).run();
}

struct Instance {
  ChunkTile tile;
  void (*kernel)(BwdParams, BwdPlan);
};
template <typename T, int kTile, bool kPerKey>
constexpr Instance instance() {
  constexpr ChunkTile kT = [] {
    ChunkTile tile = kBwdTiles[kTile];
    tile.per_key = kPerKey;
    return tile;
  }();
  static_assert(kT.operand == kDType<T>);
  using Shared = std::conditional_t<kPerKey, KeyShared<T, kT.tokens, kT.keys, kT.values>,
                                    TokenShared<T, kT.tokens, kT.keys, kT.values>>;
  static_assert(sizeof(Shared) <= bwd_token_smem_bytes(kT) && sizeof(Shared) + 4096 > bwd_token_smem_bytes(kT));
  static_assert(bwd_token_smem_bytes(kT) <= kSmallestSharedBytes);
  constexpr int kBlocks = kPerKey ? 1 : kT.blocks_per_sm;  // a thread has a key's part of all tokens in registers
  return {kT, tokens_kernel<T, kPerKey, kT.tokens, kT.keys, kT.values, kBlocks>};
}

constexpr Instance kInstances[] = {
    instance<__nv_bfloat16, 0, false>(), instance<__nv_bfloat16, 1, false>(), instance<float, 2, false>(),
    instance<float, 3, false>(),         instance<double, 4, false>(),        instance<__nv_bfloat16, 0, true>(),
    instance<__nv_bfloat16, 1, true>(),  instance<float, 2, true>(),          instance<float, 3, true>(),
    instance<double, 4, true>(),
};
static_assert(std::size(kInstances) == 2 * kBwdKernels);

}  // namespace

void bwd_tokens(const BwdParams& p, const BwdPlan& plan, Stream stream) {
  const Instance& instance =
      find_instance(kInstances, "delta_rule_bwd_tokens", [&](const Instance& i) { return i.tile == plan.tile; });
  launch({.name = "delta_rule_bwd_tokens",
          .grid = {plan.token_blocks},
          .threads = kBwdThreads,
          .smem_bytes = plan.token_smem_bytes,
          .stream = stream},
         instance.kernel, p, plan);
}

}  // namespace seqkern::delta_rule::cuda

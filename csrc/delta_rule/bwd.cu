// The backward: the scores, where time is cut a walk that only finds what segments do, the walk, and what is a matter
// of one chunk.
#include "common/launch.h"
#include "delta_rule/bwd_walk.cuh"

namespace seqkern::delta_rule::cuda {
namespace {

// [carry] and [du] [dsolve] [dcarry] of a head: dv and that of the initial state; w, and states and their gradients at
// the boundaries between chunks
//
// block    all keys and kV values of a head of one row, or of a segment of it, forward or backward
// thread   fragments of products; the state or its gradient in registers from chunk to chunk
// shared   a chunk of q, k or e, dO or u, its scores and their inverse, the gradient as an operand
// bytes    q, k, e, dO, u, dv, w, a state and its gradient for each chunk; keys once for each tile of values
// limits   2 rows segments HV ceil(V / kV) < 2^31 blocks, K <= kK
template <typename T, int kC, int kK, int kV, int kBlocks>
__global__ void __launch_bounds__(kBwdThreads, kBlocks)
    walk_kernel(const __grid_constant__ BwdParams p, const __grid_constant__ BwdPlan plan, const BwdPass pass) {
  BwdWalk<T, kC, kK, kV>(p, plan, pass).run();
}

struct Instance {
  ChunkTile tile;
  void (*kernel)(BwdParams, BwdPlan, BwdPass);
};
template <typename T, int kTile>
constexpr Instance instance() {
  constexpr ChunkTile kT = kBwdTiles[kTile];
  static_assert(kT.operand == kDType<T>);
  using Shared = WalkShared<T, kT.tokens, kT.keys, kT.values>;
  static_assert(sizeof(Shared) <= bwd_walk_smem_bytes(kT) && sizeof(Shared) + 2048 > bwd_walk_smem_bytes(kT));
  static_assert(bwd_walk_smem_bytes(kT) <= kSmallestSharedBytes);
  return {kT, walk_kernel<T, kT.tokens, kT.keys, kT.values, kT.blocks_per_sm>};
}

constexpr Instance kInstances[] = {
    instance<__nv_bfloat16, 0>(), instance<__nv_bfloat16, 1>(), instance<float, 2>(),
    instance<float, 3>(),         instance<double, 4>(),
};
static_assert(std::size(kInstances) == kBwdKernels && std::size(kBwdTiles) == kBwdKernels);

}  // namespace

void bwd(const BwdParams& p, Stream stream) {
  bwd(p, plan_bwd(p), stream);
}

void bwd(const BwdParams& p, const BwdPlan& plan, Stream stream) {
  const Instance& instance = find_instance(kInstances, "delta_rule_bwd", [&](const Instance& i) {
    ChunkTile tile = plan.tile;
    tile.per_key = false;
    return i.tile == tile;
  });
  const auto walk = [&](int64_t blocks, BwdPass pass) {
    launch({.name = "delta_rule_bwd",
            .grid = {blocks},
            .threads = kBwdThreads,
            .smem_bytes = plan.walk_smem_bytes,
            .stream = stream},
           instance.kernel, p, plan, pass);
  };
  scores(p, p.workspace, plan.scores, stream);
  if (plan.segments > 1) walk(plan.element_blocks, kElements);
  walk(plan.walk_blocks, kWalk);
  bwd_tokens(p, plan, stream);
}

}  // namespace seqkern::delta_rule::cuda

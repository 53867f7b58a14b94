// The backward: where time is cut a walk that only summarizes segments, the walk, and sums over what its blocks share.
#include "linear_attention/bwd_room.cuh"
#include "linear_attention/bwd_walk.cuh"

namespace seqkern::linear_attention::cuda {
namespace {

// [dout] to [dgates] of a head: dq, dk, dv, dgate, ddecay, dinput and that of the initial state, or parts of them
//
// block    all keys and kV values of a head of one row, or of a segment of it
// thread   fragments of products; the state or its gradient in registers from chunk to chunk
// shared   a chunk of q, k, v, dn, the state before or the gradient behind it, two matrices of scores
// bytes    k, v twice, q, dy, o, gate once for each tile of values; a state written and read for each chunk
// limits   rows segments HV ceil(V / kV) < 2^31 blocks, K <= kK
template <typename T, bool kPerKey, int kC, int kK, int kV, int kBlocks>
__global__ void __launch_bounds__(kBwdThreads, kBlocks)
    walk_kernel(const __grid_constant__ BwdParams p, const __grid_constant__ BwdPlan plan, const BwdPass pass) {
  using Decays = std::conditional_t<kPerKey, KeyDecays<T, kC, kK, kV>, TokenDecays<T, kC, kK, kV>>;
  auto& shared = shared_memory<typename Decays::Shared>();
  take_room(shared, p.workspace, plan.workspace.rooms);
  Walk<Decays> walk(p, plan, shared, pass);
  walk.run();
}

struct Instance {
  ChunkTile tile;
  void (*kernel)(BwdParams, BwdPlan, BwdPass);
};
template <typename T, int kTile>
constexpr Instance instance() {
  constexpr ChunkTile kT = kBwdTiles[kTile];
  static_assert(kT.operand == kDType<T>);
  using Shared = std::conditional_t<kT.per_key, KeyShared<T, kT.tokens, kT.keys, kT.values>,
                                    TokenShared<T, kT.tokens, kT.keys, kT.values>>;
  static_assert(sizeof(Shared) <= bwd_smem_bytes(kT) && sizeof(Shared) + 2048 > bwd_smem_bytes(kT));
  static_assert(bwd_smem_bytes(kT) <= kSmallestSharedBytes && room_bytes<Shared>() == bwd_room_bytes(kT));
  return {kT, walk_kernel<T, kT.per_key, kT.tokens, kT.keys, kT.values, kT.blocks_per_sm>};
}

constexpr Instance kInstances[] = {
    instance<__nv_bfloat16, 0>(), instance<__nv_bfloat16, 1>(), instance<__nv_bfloat16, 2>(),
    instance<__nv_bfloat16, 3>(), instance<float, 4>(),         instance<float, 5>(),
    instance<double, 6>(),        instance<__nv_bfloat16, 7>(), instance<__nv_bfloat16, 8>(),
    instance<float, 9>(),         instance<float, 10>(),        instance<double, 11>(),
};
static_assert(std::size(kInstances) == kBwdKernels && std::size(kBwdTiles) == kBwdKernels);

}  // namespace

void bwd(const BwdParams& p, Stream stream) {
  bwd(p, plan_bwd(p), stream);
}

void bwd(const BwdParams& p, const BwdPlan& plan, Stream stream) {
  const Instance& instance =
      find_instance(kInstances, "linear_attention_bwd", [&](const Instance& i) { return i.tile == plan.tile; });
  const Launch how{.name = "linear_attention_bwd",
                   .grid = {plan.blocks},
                   .threads = kBwdThreads,
                   .smem_bytes = plan.smem_bytes,
                   .stream = stream};
  if (plan.segments > 1) launch(how, instance.kernel, p, plan, kSummarize);
  launch(how, instance.kernel, p, plan, kWalk);
  bwd_reduce(p, plan, stream);
}

}  // namespace seqkern::linear_attention::cuda

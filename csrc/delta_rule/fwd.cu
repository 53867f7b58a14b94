// The forward: a block walks over the chunks of a sequence, its part of the state in registers.
#include <string>

#include "common/launch.h"
#include "delta_rule/fwd.cuh"

namespace seqkern::delta_rule::cuda {
namespace {

template <DType kOperand, int kKeys>
constexpr ChunkTile kTile = [] {
  for (const ChunkTile& tile : kFwdTiles) {
    if (tile.operand == kOperand && tile.keys == kKeys) return tile;
  }
  return ChunkTile{};
}();

// [erase] [write] [read] in the form of chunks: [solve] [chunk] [carry]. With `summarize` only what each segment but
// the last does to a state: where a state of zero goes, and where the columns of the identity go if nothing is written.
// block    values [column, column + kValues) of one head of a sequence, or of a segment of it; or as many columns of
//          the transition
// warp     part of each product's rows and columns
// shared   a chunk of q, k, e, v, r and u, its scores and inverse, some of the next; the state as an operand
// bytes    q, k, e, scores once per tile of values (twice where time is cut), v, o, u once
// limits   rows x heads x tiles x segments < 2^31 blocks, K <= 256
template <typename T, int kTokens, int kKeys, int kValues, int kBlocks>
__global__ void __launch_bounds__(kFwdThreads, kBlocks)
    walk(const __grid_constant__ FwdParams p, const __grid_constant__ FwdPlan plan, const bool summarize) {
  const auto [heads, tile] = divide(blockIdx.x, summarize ? plan.tiles + plan.transitions / kValues : plan.tiles);
  const auto [stretches, hv] = divide(heads, p.value_heads);
  const auto [row, segment] = divide(stretches, summarize ? plan.segments - 1 : plan.segments);
  auto& shared = shared_memory<FwdShared<T, kTokens, kKeys, kValues>>();
  const bool transition = tile >= plan.tiles;
  if (threadIdx.x == 0) {
    const Stretch stretch = stretch_of<kTokens>(p.sequences, row, segment, plan.segments);
    const int64_t begin = p.sequences.cu_seqlens ? packed_span(p.sequences, row).begin : 0;
    FwdWork& work = shared.work;
    work.stretch = stretch, work.hv = hv, work.segment = segment;
    work.h = divide(hv, divide(p.value_heads, p.heads).quotient).quotient;
    work.slot = first_slot<kTokens>(p.sequences, row) + divide(stretch.begin - begin, kTokens).quotient;
    work.element = row * (plan.segments - 1) * p.value_heads + hv;
    work.summarizes = summarize, work.transition = transition;
  }
  __syncthreads();
  const int column = static_cast<int>(transition ? tile - plan.tiles : tile) * kValues;
  FwdWalk<T, kTokens, kKeys, kValues> w{p, plan, shared, column, {}};
  if (summarize) {
    w.clear();
  } else {
    w.enter();
#pragma unroll 1
    for (int64_t earlier = 0; earlier < w.work().segment; ++earlier) w.pass(earlier);
  }
  w.S.store(shared.state);

  w.run();
  if (summarize)
    w.store_element();
  else if (w.work().stretch.last)
    w.leave();
}

struct Instance {
  ChunkTile tile;
  void (*kernel)(FwdParams, FwdPlan, bool);
};

template <typename T, int kKeys>
constexpr Instance instance() {
  constexpr ChunkTile tile = kTile<kDType<T>, kKeys>;
  static_assert(fwd_smem_bytes(tile) <= kSmallestSharedBytes, "what chunk_tile.h promises");
  static_assert(sizeof(FwdShared<T, tile.tokens, kKeys, tile.values>) <= fwd_smem_bytes(tile));
  return {tile, walk<T, tile.tokens, kKeys, tile.values, tile.blocks_per_sm>};
}

constexpr Instance kInstances[] = {
    instance<__nv_bfloat16, 64>(), instance<__nv_bfloat16, 128>(), instance<__nv_bfloat16, 256>(),
    instance<float, 128>(),        instance<float, 256>(),         instance<double, 256>(),
};
static_assert(std::size(kInstances) == kFwdKernels);

}  // namespace

void fwd(const FwdParams& p, Stream stream) {
  fwd(p, plan_fwd(p), stream);
}

void fwd(const FwdParams& p, const FwdPlan& plan, Stream stream) {
  if (p.keys > kMaxKeys) {
    throw std::runtime_error("seqkern: delta_rule: K must be at most " + std::to_string(kMaxKeys) + " on CUDA, got " +
                             std::to_string(p.keys));
  }
  const Instance& instance =
      find_instance(kInstances, "delta_rule_fwd", [&](const Instance& i) { return i.tile == plan.tile; });
  const auto launch_walk = [&](const char* name, int64_t blocks, bool summarize) {
    launch({.name = name, .grid = {blocks}, .threads = kFwdThreads, .smem_bytes = plan.smem_bytes, .stream = stream},
           instance.kernel, p, plan, summarize);
  };
  scores(p, p.workspace, plan.scores, stream);
  if (plan.segments > 1) {
    const int64_t tiles = plan.tiles + plan.transitions / plan.tile.values;
    launch_walk("delta_rule_summarize", plan.rows * p.value_heads * tiles * (plan.segments - 1), true);
  }
  launch_walk("delta_rule_fwd", plan.blocks * plan.segments, false);
}

}  // namespace seqkern::delta_rule::cuda

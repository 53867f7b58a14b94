// The forward: a block walks over the chunks of a sequence, its part of the state in registers.
#include <new>
#include <string>

#include "common/launch.h"
#include "linear_attention/fwd.cuh"

namespace seqkern::linear_attention::cuda {

// Tiles that are too large for the shared memory of the smallest devices: the decays are in the workspace.
template <int kTokens, int kKeys, int kValues>
struct FwdMatrices {
  Matrix<double, kTokens, kKeys> q, k;
  Matrix<double, kTokens, kValues> v;
  Matrix<double, kTokens, kTokens> scores;
  Matrix<double, kKeys, kValues> state;
};
template <int kTokens, int kKeys>
struct FwdRoom {
  Matrix<double, kTokens, kKeys>& decays;
};
template <int kTokens, int kKeys, int kValues>
struct FwdTiles<double, kTokens, kKeys, kValues, true> : FwdMatrices<kTokens, kKeys, kValues>,
                                                         FwdRoom<kTokens, kKeys> {};

namespace {

template <DType kOperand, bool kPerKey, int kKeys>
constexpr ChunkTile kTile = [] {
  for (const ChunkTile& tile : kFwdTiles) {
    if (tile.operand == kOperand && tile.per_key == kPerKey && tile.keys == kKeys) return tile;
  }
  return ChunkTile{};
}();

// [gate] [state] [sum] [read] in the form of chunks, [norm] [out] [skip]. With `summarize` only what each segment but
// the last does to a state.
// block    values [column, column + kValues) of one head of a sequence, or of a segment of it
// warp     part of each product's rows and columns
// shared   a chunk of q, k, v, the scores, and the state as an operand
// bytes    q, k, v, gates once per tile of values (twice where time is cut); y and what is kept once
// limits   rows x heads x tiles x segments < 2^31 blocks, K <= 256
template <typename T, int kTokens, int kKeys, int kValues, bool kPerKey, int kBlocks>
__global__ void __launch_bounds__(kFwdThreads, kBlocks)
    walk(const __grid_constant__ FwdParams p, const __grid_constant__ FwdPlan plan, const bool summarize) {
  using R = Accumulator<T>;
  auto& shared = shared_memory<FwdShared<T, kTokens, kKeys, kValues, kPerKey>>();
  const auto [heads, tile] = divide(blockIdx.x, plan.tiles);
  const auto [stretches, head] = divide(heads, p.value_heads);
  const auto [row, segment] = divide(stretches, summarize ? plan.segments - 1 : plan.segments);
  if (threadIdx.x == 0) {
    if constexpr (kPerKey && sizeof(T) == 8) {
      auto* const rooms = static_cast<unsigned char*>(p.workspace) + plan.rooms;
      auto* const decays = reinterpret_cast<Matrix<R, kTokens, kKeys>*>(rooms) + blockIdx.x;
      new (static_cast<FwdRoom<kTokens, kKeys>*>(&shared)) FwdRoom<kTokens, kKeys>{*decays};
    }
    shared.forget = R(0);
    shared.work = {.stretch = stretch_of<kTokens>(p.sequences, row, segment, plan.segments),
                   .head = head,
                   .key_head = divide(head, divide(p.value_heads, p.heads).quotient).quotient,
                   .segment = segment,
                   .element = (row * (plan.segments - 1) * p.value_heads + head) * plan.tiles + tile};
  }
  __syncthreads();
  const auto element = [&](int64_t of_segment) {
    const int64_t index = shared.work.element + of_segment * p.value_heads * plan.tiles;
    return FwdElement<R>(p.workspace, index, element_numbers(plan.tile), kKeys);
  };

  FwdWalk<T, kTokens, kKeys, kValues, kPerKey> w{p, shared, static_cast<int>(tile) * kValues, {}, R(1)};
  if (summarize) {
    w.clear();
  } else {
    w.enter();
#pragma unroll 1
    for (int64_t earlier = 0; earlier < shared.work.segment; ++earlier) w.fold(element(earlier));
  }
  for (int v = threadIdx.x; v < kValues; v += kFwdThreads) {
    const bool exists = p.skip && w.column + v < p.size;
    shared.skip[v] = exists ? load<R>(p.skip, shared.work.head * p.skip_h + (w.column + v) * p.skip_v) : R(0);
  }

  bool seen = false;  // a sequence of this row
  for (int64_t tau = w.work().stretch.begin; tau < w.work().stretch.end;) {
    const Chunk chunk = chunk_at<kTokens>(p.sequences, w.work().stretch, tau);
    tau += chunk.count;
    if (chunk.padding) {
      w.pad(chunk);
      continue;
    }
    if (chunk.starts && seen) w.clear();
    seen = true;
    w.fetch(chunk);
    if (!summarize)
      w.read(chunk);
    else if constexpr (kPerKey)
      carry_keys(shared.k, shared.decays);
    w.advance();
  }
  if (summarize)
    w.store_element(element(shared.work.segment));
  else if (w.work().stretch.last)
    w.leave();
}

struct Instance {
  ChunkTile tile;
  void (*kernel)(FwdParams, FwdPlan, bool);
};

template <typename T, bool kPerKey, int kKeys>
constexpr Instance instance() {
  constexpr ChunkTile tile = kTile<kDType<T>, kPerKey, kKeys>;
  static_assert(fwd_smem_bytes(tile) <= kSmallestSharedBytes, "what chunk_tile.h promises");
  static_assert(sizeof(FwdShared<T, tile.tokens, kKeys, tile.values, kPerKey>) <= fwd_smem_bytes(tile));
  return {tile, walk<T, tile.tokens, kKeys, tile.values, kPerKey, tile.blocks_per_sm>};
}

constexpr Instance kInstances[] = {
    instance<__nv_bfloat16, false, 64>(), instance<__nv_bfloat16, false, 128>(), instance<__nv_bfloat16, false, 256>(),
    instance<__nv_bfloat16, true, 128>(), instance<__nv_bfloat16, true, 256>(),  instance<float, false, 128>(),
    instance<float, false, 256>(),        instance<float, true, 128>(),          instance<float, true, 256>(),
    instance<double, false, 256>(),       instance<double, true, 256>(),
};
static_assert(std::size(kInstances) == kFwdKernels);

}  // namespace

void fwd(const FwdParams& p, Stream stream) {
  fwd(p, plan_fwd(p), stream);
}

void fwd(const FwdParams& p, const FwdPlan& plan, Stream stream) {
  if (p.keys > kMaxKeys) {
    throw std::runtime_error("seqkern: linear_attention: K must be at most " + std::to_string(kMaxKeys) +
                             " on CUDA, got " + std::to_string(p.keys));
  }
  const Instance& instance =
      find_instance(kInstances, "linear_attention_fwd", [&](const Instance& i) { return i.tile == plan.tile; });
  const auto launch_walk = [&](const char* name, int64_t segments, bool summarize) {
    launch({.name = name,
            .grid = {plan.blocks * segments},
            .threads = kFwdThreads,
            .smem_bytes = plan.smem_bytes,
            .stream = stream},
           instance.kernel, p, plan, summarize);
  };
  if (plan.segments > 1) launch_walk("linear_attention_summarize", plan.segments - 1, true);
  launch_walk("linear_attention_fwd", plan.segments, false);
}

}  // namespace seqkern::linear_attention::cuda

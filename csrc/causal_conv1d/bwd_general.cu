// Backward of the general path: any W and dilation, fp64. One element per thread, taps through the caches.
#include "causal_conv1d/gradient.cuh"
#include "causal_conv1d/params.h"
#include "causal_conv1d/tile.h"
#include "common/launch.h"
#include "common/reduce.cuh"

namespace seqkern::causal_conv1d::cuda {
namespace {

template <typename T>
constexpr Tile kGeneralTile = pick_bwd_tile(Path::kGeneral, kDType<T>);

// dpre as the general path reads it: dy itself, or with SiLU kept in the workspace, in the memory order of x.
template <typename T>
struct KeptDpre {
  using A = Accumulator<T>;
  const BwdParams& p;
  A* kept;
  Strides stride;

  __device__ __forceinline__ KeptDpre(const BwdParams& p_, const Cut& cut) : p(p_) {
    const int64_t D = p.channels, L = p.sequences.length;
    kept = static_cast<A*>(p.workspace) + p.sequences.batch * cut.along_time * (p.width + 1) * D;
    stride = p.x_stride.l == 1 ? Strides{D * L, L, 1} : Strides{D * L, 1, D};
  }
  __device__ __forceinline__ A* at(int64_t b, int64_t d, int64_t tau) const {
    return Row<A>(kept, stride, p.sequences, b, d).at(tau);
  }
  __device__ __forceinline__ A dy(int64_t b, int64_t d, int64_t tau) const {
    return to<A>(load(Row<const T>(static_cast<const T*>(p.dy), p.dy_stride, p.sequences, b, d).at(tau)));
  }
  __device__ __forceinline__ A operator()(int64_t b, int64_t d, int64_t tau) const {
    return p.silu ? load(at(b, d, tau)) : dy(b, d, tau);
  }
};

// dpre_t = dy_t silu'(pre_t), 0 in padding; any W and dilation
// block    `threads` neighbouring elements
// thread   one element; the W taps of pre_t are loaded through the caches
// shared   none
// bytes    per token: 2 size read, 4 (fp64: 8) written (requested: W times the reads of x)
// limits   B D L / threads < 2^31 blocks
template <typename T>
__global__ void __launch_bounds__(kGeneralTile<T>.threads, kGeneralTile<T>.blocks_per_sm)
    bwd_dpre(const __grid_constant__ BwdParams p, const __grid_constant__ Cut cut) {
  const Element at(p, global_thread());
  if (at.b >= p.sequences.batch) return;
  const KeptDpre<T> dpre(p, cut);
  const Span span = span_at(p.sequences, at.b, at.tau, p.state_size(), 0);
  Accumulator<T> value = 0;
  if (!span.padding) {
    const int64_t initial = visible_initial_row(p, at.b, span, at.tau - p.state_size());
    value = dpre_of<T>(p, Channel<T>(p, at.b, at.d).pre(span, initial, at.tau), dpre.dy(at.b, at.d, at.tau));
  }
  store(dpre.at(at.b, at.d, at.tau), value);
}

// dx_t = sum_k weight_k dpre_{t + k dilation} [dx]
// block    `threads` neighbouring elements, then elements of dinitial_state
// thread   one element; W values of dpre are loaded through the caches
// shared   none
// bytes    per token: dpre read, size written (requested: W times the reads)
// limits   B D L / threads < 2^31 blocks
template <typename T>
__global__ void __launch_bounds__(kGeneralTile<T>.threads, kGeneralTile<T>.blocks_per_sm)
    bwd_dx(const __grid_constant__ BwdParams p, const __grid_constant__ Cut cut) {
  constexpr Tile kTile = kGeneralTile<T>;
  using A = Accumulator<T>;
  const KeptDpre<T> dpre(p, cut);
  if (blockIdx.x >= cut.token_blocks) {
    return write_dinitial_state<T>(p, global_thread() - cut.token_blocks * kTile.threads,
                                   [&](int64_t b, int64_t d, const Span&, int64_t tau) { return dpre(b, d, tau); });
  }
  const Element at(p, global_thread());
  if (at.b >= p.sequences.batch) return;
  const Span span = span_at(p.sequences, at.b, at.tau, 0, p.state_size());
  A sum = 0;
  if (!span.padding) {
    sum = dfinal_of<A>(p, visible_final_row(p, p.dfinal_state, at.b, span, at.tau), at.d, span, at.tau);
    for (int64_t k = 0; k < p.width && at.tau + k * p.dilation < span.end; ++k) {
      const A weight = load<A>(p.weight, (at.d + 1) * p.width - 1 - k);
      sum = fma(weight, dpre(at.b, at.d, at.tau + k * p.dilation), sum);
    }
  }
  const Row<T> dx(static_cast<T*>(p.dx), p.dx_stride, p.sequences, at.b, at.d);
  store(dx.at(at.tau), to<T>(sum));
}

// dweight_j = sum_t dpre_t x_{t - (W-1-j) dilation}, dbias = sum_t dpre_t, over a chunk [dw]
// block    `threads` neighbouring threads
// thread   one (b, chunk, j, d) where channels are contiguous; else a lane of the warp that owns it
// shared   none
// bytes    per token: (W + 1) (dpre + size) requested, from the caches
// limits   B D L (W + 1) / (chunk threads / 32) < 2^31 blocks
template <typename T>
__global__ void __launch_bounds__(kGeneralTile<T>.threads, kGeneralTile<T>.blocks_per_sm)
    bwd_dweight(const __grid_constant__ BwdParams p, const __grid_constant__ Cut cut) {
  constexpr Tile kTile = kGeneralTile<T>;
  using A = Accumulator<T>;
  constexpr int kChunk = chunk_of(Path::kGeneral, kTile);
  const int lanes = p.x_stride.l == 1 ? kWarpSize : 1, lane = threadIdx.x % lanes;
  const int64_t unit = global_thread() / lanes;  // is the partial_index
  const auto [row, d] = divide(unit, p.channels);
  const auto [b_chunk, j] = divide(row, p.width + 1);
  const auto [b, chunk] = divide(b_chunk, cut.along_time);
  if (b >= p.sequences.batch) return;
  const KeptDpre<T> dpre(p, cut);
  const Channel<T> channel(p, b, d);
  const int64_t end = min((chunk + 1) * kChunk, p.sequences.length);
  const int64_t back = j < p.width ? (p.width - 1 - j) * p.dilation : 0;
  A sum = 0;
  Span span{};
  for (int64_t tau = chunk * kChunk + lane; tau < end; tau += lanes) {
    if (tau < span.begin || tau >= span.end) span = span_at(p.sequences, b, tau, back, lanes == 1 ? end - tau : 0);
    if (span.padding) continue;
    if (j == p.width) {
      sum += dpre(b, d, tau);
    } else {
      const int64_t initial = visible_initial_row(p, b, span, tau - back);
      sum = fma(dpre(b, d, tau), channel.value(span, initial, tau - back), sum);
    }
  }
  if (lanes == kWarpSize) sum = warp_sum(sum);
  if (lane == 0) store(static_cast<A*>(p.workspace) + unit, sum);
}

using Kernel = void (*)(BwdParams, Cut);

struct Instance {
  DType dtype;
  Kernel dpre, dx, dweight;
};

template <typename T>
constexpr Instance kInstance = {kDType<T>, bwd_dpre<T>, bwd_dx<T>, bwd_dweight<T>};

constexpr Instance kInstances[] = {kInstance<float>, kInstance<__nv_bfloat16>, kInstance<__half>, kInstance<double>};
static_assert(3 * std::size(kInstances) == kBwdGeneralKernels);

}  // namespace

void bwd_general(const BwdParams& p, const Plan& plan, Stream stream) {
  const auto start = [&](const char* name, int64_t blocks, Kernel kernel) {
    launch({.name = name, .grid = {blocks}, .threads = plan.tile.threads, .stream = stream}, kernel, p, plan.cut);
  };
  const int lanes = p.x_stride.l == 1 ? 32 : 1;
  const Instance& instance =
      find_instance(kInstances, plan.kernel, [&](const Instance& i) { return i.dtype == p.dtype; });
  if (p.silu) start("causal_conv1d_bwd_dpre", plan.cut.token_blocks, instance.dpre);
  start("causal_conv1d_bwd_dx", plan.cut.token_blocks + plan.cut.state_blocks, instance.dx);
  start("causal_conv1d_bwd_dweight", ceil_div(partial_elements(p) * lanes, plan.tile.threads), instance.dweight);
}

}  // namespace seqkern::causal_conv1d::cuda

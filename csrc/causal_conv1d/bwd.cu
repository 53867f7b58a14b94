// Backward, W <= 4: dx and sums of the weight gradients over chunks of time in one kernel; for all paths: the sum over
// chunks, in a fixed order.
#include "causal_conv1d/gradient.cuh"
#include "causal_conv1d/params.h"
#include "causal_conv1d/tile.h"
#include "common/launch.h"
#include "common/reduce.cuh"

namespace seqkern::causal_conv1d::cuda {
namespace {

template <typename T>
constexpr Tile kTimeTile = pick_bwd_tile(Path::kTime, kDType<T>);
template <typename T>
constexpr Tile kChannelTile = pick_bwd_tile(Path::kChannel, kDType<T>);

// Where the partial sum of weight j (j == W: of the bias) over a chunk is kept: (B, chunks, W + 1, D).
__device__ __forceinline__ int64_t partial_index(const Inputs& p, int64_t chunks, int64_t b, int64_t chunk, int64_t j,
                                                 int64_t d) {
  return ((b * chunks + chunk) * (p.width + 1) + j) * p.channels + d;
}

// Tap k of the fast paths, kMaxTaps being the bias: its j, -1 if this W lacks it.
__device__ __forceinline__ int64_t partial_row(const Inputs& p, int k) {
  return k == kMaxTaps ? p.width : p.width - 1 - k;
}

// dx_t = sum_k weight_k dpre_{t+k}, to which the final state adds what it holds of x_t [dx]; dpre is 0 from the end of
// the sequence on. dpre[k] is that of t + k.
__device__ __forceinline__ float dx_of(const Taps& taps, int64_t width, const float* dpre, float dfinal) {
  float sum = dfinal;
#pragma unroll
  for (int k = 0; k < kMaxTaps; ++k) {
    if (k < width) sum = fma(taps.weight[k], dpre[k], sum);
  }
  return sum;
}

// The gradient of an initial state from dpre that is computed once more.
template <typename T>
__device__ __forceinline__ void recompute_dinitial_state(const BwdParams& p, int64_t i) {
  write_dinitial_state<T>(p, i, [&](int64_t b, int64_t d, const Span& span, int64_t tau) {
    const int64_t initial = visible_initial_row(p, b, span, tau - p.state_size());
    const Row<const T> dy(static_cast<const T*>(p.dy), p.dy_stride, p.sequences, b, d);
    return dpre_of<T>(p, Channel<T>(p, b, d).pre(span, initial, tau), to<Accumulator<T>>(load(dy.at(tau))));
  });
}

// dpre_t = dy_t silu'(pre_t), dx_t = sum_k weight_k dpre_{t+k} [dx], dweight_k = sum_t dpre_t x_{t-k} [dw], time
// contiguous, W <= 4
// block    threads / 32 warps; a warp owns one chunk of tokens of one row (b, d)
// thread   `count` vectors of the chunk, with kHalo elements of x before and of x and dy after each
// shared   none
// bytes    per token: 2 size read, size written, 2 (W + 1) / chunk partial sums of 4 bytes
// limits   B D L / (chunk threads / 32) < 2^31 blocks
template <typename T>
__global__ void __launch_bounds__(kTimeTile<T>.threads, kTimeTile<T>.blocks_per_sm)
    bwd_time(const __grid_constant__ BwdParams p, const __grid_constant__ Cut cut) {
  constexpr Tile kTile = kTimeTile<T>;
  if (blockIdx.x >= cut.token_blocks) {
    return recompute_dinitial_state<T>(p, global_thread() - cut.token_blocks * kTile.threads);
  }
  constexpr int kVector = kTile.vector;
  const auto [row, chunk] = divide(global_thread() / kWarpSize, cut.along_time);
  const auto [b, d] = divide(row, p.channels);
  if (b >= p.sequences.batch) return;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t length = p.sequences.length;
  const Row<const T> x(static_cast<const T*>(p.x), p.x_stride, p.sequences, b, d);
  const Row<const T> dy(static_cast<const T*>(p.dy), p.dy_stride, p.sequences, b, d);
  const Row<T> dx(static_cast<T*>(p.dx), p.dx_stride, p.sequences, b, d);
  const int shift = vector_shift<kVector>(x);
  const Taps taps = load_taps(p, d);
  float sums[kMaxTaps + 1] = {};  // of the weights by steps back, then of the bias

#pragma unroll 1
  for (int u = 0; u < kTile.count; ++u) {
    const int64_t tau = chunk * chunk_of(Path::kTime, kTile) + (u * kWarpSize + lane) * kVector - shift;
    if (tau >= length) break;
    const int64_t stop = min(tau + kVector, length);
    // A piece: the tokens of this vector that belong to one span. A second one, which is rare, loads them again.
    for (int64_t begin = max(tau, int64_t{0}), end; begin < stop; begin = end) {
      const Vector<T, kHalo> x_before = load_tokens<kHalo>(x, tau - kHalo, length);
      const Vector<T, kVector> x_own = load_tokens<kVector>(x, tau, length);
      const Vector<T, kHalo> x_after = load_tokens<kHalo>(x, tau + kVector, length);
      const Vector<T, kVector> dy_own = load_tokens<kVector>(dy, tau, length);
      const Vector<T, kHalo> dy_after = load_tokens<kHalo>(dy, tau + kVector, length);
      const Span span = span_in_window<kPast + kVector + kPast>(p.sequences, b, begin, tau - kPast);
      end = min(span.end, stop);
      const int first = static_cast<int>(begin - tau), last = static_cast<int>(end - tau);
      const Past past(p, b, d, span, begin, tau - kPast);
      const int64_t final = visible_final_row(p, p.dfinal_state, b, span, end - 1);
      const Near dfinal = newest_columns(p, p.dfinal_state, final, d);
      float window[kPast + kVector + kPast];  // x_{tau - kPast} ...
#pragma unroll
      for (int i = 0; i < kPast; ++i) window[i] = to<float>(x_before[kHalo - kPast + i]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) window[kPast + i] = to<float>(x_own[i]);
#pragma unroll
      for (int i = 0; i < kPast; ++i) window[kPast + kVector + i] = to<float>(x_after[i]);
      past.replace_in(window);

      float dpre[kVector + kPast];  // dpre_tau ...
      const int inside = span.padding ? 0 : static_cast<int>(min(span.end - tau, int64_t{kVector + kPast}));
#pragma unroll
      for (int i = 0; i < kVector + kPast; ++i) {
        const float dy_i = to<float>(i < kVector ? dy_own[i] : dy_after[i - kVector]);
        const float value = dpre_of<T>(p, pre_of(taps, p.width, window, i), dy_i);
        dpre[i] = first <= i && i < inside ? value : 0.0f;
      }

      Vector<T, kVector> out;
      const int to_end = static_cast<int>(span.end - tau);  // used near the end only
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        out[i] = to<T>(dx_of(taps, p.width, dpre + i, final < 0 ? 0.0f : dfinal.at(to_end - i)));
      }
      store_tokens(dx, tau, out, first, last);

      // Not by products with dpre = 0: x of padding may be NaN.
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (first <= i && i < min(last, inside)) {
#pragma unroll
          for (int k = 0; k < kMaxTaps; ++k) sums[k] = fma(dpre[i], window[i + kPast - k], sums[k]);
          sums[kMaxTaps] += dpre[i];
        }
      }
    }
  }

  auto* partials = static_cast<float*>(p.workspace);
#pragma unroll
  for (int k = 0; k <= kMaxTaps; ++k) {
    const float sum = warp_sum(sums[k]);
    const int64_t j = partial_row(p, k);
    if (lane == 0 && j >= 0) store(partials + partial_index(p, cut.along_time, b, chunk, j, d), sum);
  }
}

template <int kChannels, int kTiles>
struct BwdChannelShared {
  SharedTaps<kChannels> taps;
  float sums[kTiles][kMaxTaps + 1][kChannels];
};

// The same [dx] [dw], channels contiguous, W <= 4
// block    kChannelLanes * vector channels x one chunk of tokens of one batch row
// thread   `vector` channels x `count` tokens; it walks kPast tokens farther, since dx looks ahead
// shared   weights of the block's channels; the threads' sums of [dw], which are then added in the order of time
// bytes    per token: 2 size read, size written, 2 (W + 1) / chunk partial sums of 4 bytes
// limits   B L D / (vector count threads) < 2^31 blocks
template <typename T>
__global__ void __launch_bounds__(kChannelTile<T>.threads, kChannelTile<T>.blocks_per_sm)
    bwd_channel(const __grid_constant__ BwdParams p, const __grid_constant__ Cut cut) {
  constexpr Tile kTile = kChannelTile<T>;
  if (blockIdx.x >= cut.token_blocks) {
    return recompute_dinitial_state<T>(p, global_thread() - cut.token_blocks * kTile.threads);
  }
  constexpr int kVector = kTile.vector, kChannels = kChannelLanes * kVector, kTiles = kTile.threads / kChannelLanes;
  constexpr int kGroup = 4;  // tokens whose loads are in flight together
  const auto [row_block, channel_block] = divide(blockIdx.x, cut.along_channels);
  const auto [b, chunk] = divide(row_block, cut.along_time);
  const int lane = threadIdx.x % kChannelLanes * kVector;  // its first channel in the block
  const Lanes<kVector> lanes(p, cut, channel_block * kChannels + lane);
  const int tile = threadIdx.x / kChannelLanes;
  const int64_t tau = chunk * chunk_of(Path::kChannel, kTile) + tile * kTile.count;
  const int64_t stop = min(tau + kTile.count, p.sequences.length);
  const Row<const T> x(static_cast<const T*>(p.x), p.x_stride, p.sequences, b, lanes.first);
  const Row<const T> dy(static_cast<const T*>(p.dy), p.dy_stride, p.sequences, b, lanes.first);
  const Row<T> dx(static_cast<T*>(p.dx), p.dx_stride, p.sequences, b, lanes.first);

  auto& shared = shared_memory<BwdChannelShared<kChannels, kTiles>>();
  shared.taps.fill(p, channel_block * kChannels);
  __syncthreads();
  Taps taps[kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e) taps[e] = shared.taps.at(lane + e);
  float sums[kVector][kMaxTaps + 1] = {};

  for (int64_t begin = tau, end; begin < stop; begin = end) {
    const Span span = span_in_window<kPast + kTile.count + kPast>(p.sequences, b, begin, tau - kPast);
    end = min(span.end, stop);
    const int64_t final = visible_final_row(p, p.dfinal_state, b, span, end - 1);
    // Counted from `begin`: tokens of this piece, and tokens that have a dpre, kPast more of them where the span goes
    // on.
    const int own = static_cast<int>(end - begin);
    const int inside = span.padding ? 0 : static_cast<int>(min(span.end, end + kPast) - begin);
    Window<kVector> window, dpre = {};
    enter(window, p, lanes, x, b, span, begin);

    const T* x_token = x.at(begin);
    const T* dy_token = dy.at(begin);
    T* dx_token = dx.at(begin - kPast);
#pragma unroll 1
    for (int group = 0; group < own + kPast; group += kGroup) {
      Vector<T, kVector> x_group[kGroup], dy_group[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i, x_token += x.step, dy_token += dy.step) {
        const bool needed = group + i < inside;
        x_group[i] = needed ? lanes.load_from(x_token) : zeros<T, kVector>();
        dy_group[i] = needed ? lanes.load_from(dy_token) : zeros<T, kVector>();
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i, dx_token += dx.step) {
        const int now = group + i, done = now - kPast;  // dx of token `done` is complete
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          push<kVector>(window, e, to<float>(x_group[i][e]));
          const float value = dpre_of<T>(p, pre_of(taps[e], p.width, window[e], 0), to<float>(dy_group[i][e]));
          push<kVector>(dpre, e, now < inside ? value : 0.0f);
          if (now < min(inside, own)) {
#pragma unroll
            for (int k = 0; k < kMaxTaps; ++k) sums[e][k] = fma(value, window[e][kPast - k], sums[e][k]);
            sums[e][kMaxTaps] += value;
          }
        }
        if (done < 0 || done >= own) continue;
        Vector<T, kVector> out;
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          const float dfinal = e < lanes.count ? dfinal_of<float>(p, final, lanes.first + e, span, begin + done) : 0.0f;
          out[e] = to<T>(dx_of(taps[e], p.width, dpre[e], dfinal));
        }
        lanes.store_to(dx_token, out);
      }
    }
  }

#pragma unroll
  for (int e = 0; e < kVector; ++e) {
#pragma unroll
    for (int k = 0; k <= kMaxTaps; ++k) shared.sums[tile][k][lane + e] = sums[e][k];
  }
  __syncthreads();
  auto* partials = static_cast<float*>(p.workspace);
  for (int i = threadIdx.x; i < (kMaxTaps + 1) * kChannels; i += kTile.threads) {
    const int k = i / kChannels, channel = i % kChannels;
    const int64_t j = partial_row(p, k), d = channel_block * kChannels + channel;
    if (j < 0 || d >= p.channels) continue;
    float sum = 0.0f;
#pragma unroll 8
    for (int other = 0; other < kTiles; ++other) sum += shared.sums[other][k][channel];
    store(partials + partial_index(p, cut.along_time, b, chunk, j, d), sum);
  }
}

template <typename A, int kWarps>
struct ReduceShared {
  A sums[kWarps][kReduceChannels];
};

// dweight_j, dbias = sum over batch rows and chunks of their partial sums [dw]
// block    one j (j == W: the bias) of kReduceChannels channels
// thread   every warps-th partial sum of one channel; then the first warp adds the warps' sums in order
// shared   one sum per thread
// bytes    the partial sums read, the gradients written
// limits   (W + 1) D / kReduceChannels < 2^31 blocks
template <typename A>
__global__ void __launch_bounds__(kReduceTile.threads, kReduceTile.blocks_per_sm)
    bwd_reduce(const __grid_constant__ BwdParams p, const __grid_constant__ Cut cut) {
  constexpr int kWarps = kReduceTile.threads / kReduceChannels;
  auto& shared = shared_memory<ReduceShared<A, kWarps>>();
  const auto [channel_block, j] = divide(blockIdx.x, p.width + 1);
  const int warp = threadIdx.x / kReduceChannels, lane = threadIdx.x % kReduceChannels;
  const int64_t d = channel_block * kReduceChannels + lane;
  const int64_t count = p.sequences.batch * cut.along_time, step = (p.width + 1) * p.channels;
  const A* partials = static_cast<const A*>(p.workspace) + j * p.channels + d;
  A sum = 0;
  if (d < p.channels) {
#pragma unroll 8
    for (int64_t i = warp; i < count; i += kWarps) sum += load(partials + i * step);
  }
  shared.sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || d >= p.channels) return;
  for (int other = 1; other < kWarps; ++other) sum += shared.sums[other][lane];
  if (j < p.width)
    store(p.dweight, d * p.width + j, sum);
  else if (p.dbias)
    store(p.dbias, d, sum);
}

using Kernel = void (*)(BwdParams, Cut);

struct Instance {
  Path path;
  DType dtype;
  Kernel kernel;
};

constexpr Instance kInstances[] = {
    {Path::kTime, DType::kFloat32, bwd_time<float>},
    {Path::kTime, DType::kBFloat16, bwd_time<__nv_bfloat16>},
    {Path::kTime, DType::kFloat16, bwd_time<__half>},
    {Path::kChannel, DType::kFloat32, bwd_channel<float>},
    {Path::kChannel, DType::kBFloat16, bwd_channel<__nv_bfloat16>},
    {Path::kChannel, DType::kFloat16, bwd_channel<__half>},
};
constexpr Kernel kReduceInstances[] = {bwd_reduce<float>, bwd_reduce<double>};
static_assert(std::size(kInstances) + std::size(kReduceInstances) == kBwdKernels);

}  // namespace

void bwd(const BwdParams& p, Stream stream) {
  const Plan plan = plan_bwd(p);
  const Path path = pick_path(p);
  if (path == Path::kGeneral) {
    bwd_general(p, plan, stream);
  } else {
    const Instance& instance =
        find_instance(kInstances, plan.kernel, [&](const Instance& i) { return i.path == path && i.dtype == p.dtype; });
    launch({.name = plan.kernel,
            .grid = {plan.cut.token_blocks + plan.cut.state_blocks},
            .threads = plan.tile.threads,
            .smem_bytes = plan.smem_bytes,
            .stream = stream},
           instance.kernel, p, plan.cut);
  }
  const bool is_double = accumulator(p.dtype) == DType::kFloat64;
  launch({.name = "causal_conv1d_bwd_reduce",
          .grid = {ceil_div(p.channels, kReduceChannels) * (p.width + 1)},
          .threads = kReduceTile.threads,
          .smem_bytes = kReduceTile.threads * size_of(accumulator(p.dtype)),
          .stream = stream},
         kReduceInstances[is_double], p, plan.cut);
}

}  // namespace seqkern::causal_conv1d::cuda

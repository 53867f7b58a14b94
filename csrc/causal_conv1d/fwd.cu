// Forward. One launch: blocks that own tokens, then blocks that own elements of the final state.
#include "causal_conv1d/params.h"
#include "causal_conv1d/tile.h"
#include "causal_conv1d/window.cuh"
#include "common/launch.h"

namespace seqkern::causal_conv1d::cuda {
namespace {

template <typename T>
constexpr Tile kTimeTile = pick_fwd_tile(Path::kTime, kDType<T>);
template <typename T>
constexpr Tile kChannelTile = pick_fwd_tile(Path::kChannel, kDType<T>);
template <typename T>
constexpr Tile kGeneralTile = pick_fwd_tile(Path::kGeneral, kDType<T>);

// y from pre, in the data's dtype.
template <typename T, typename A>
__device__ __forceinline__ T output(const Inputs& p, A pre) {
  return to<T>(p.silu ? silu<T>(pre) : pre);
}

// [state] final_state_{n,d,c} = x_{end - S + c}, which a sequence shorter than S takes from its initial state.
template <typename T>
__device__ __forceinline__ void write_final_state(const FwdParams& p, int64_t i) {
  if (i >= state_elements(p)) return;
  const auto [nd, column] = divide(i, p.state_size());
  const auto [n, d] = divide(nd, p.channels);
  const int64_t b = p.sequences.cu_seqlens ? 0 : n;
  const Span span = span_of_state(p.sequences, n, false, p.state_size());
  const int64_t tau = span.end - p.state_size() + column;
  const int64_t initial = visible_initial_row(p, b, span, tau);
  store(p.final_state, i, Channel<T>(p, b, d).value(span, initial, tau));
}

// y_t = silu?(bias + sum_k weight_k x_{t-k}) [conv], time contiguous, W <= 4
// block    `threads` neighbouring threads of all rows (b, d), along_time threads for each row
// thread   `count` vectors of tokens of one row, spread over the row; it loads each and the kHalo elements before it
// shared   none
// bytes    per token: size read, size written (requested: kHalo / vector more reads, from L1)
// limits   B D L / (vector count threads) < 2^31 blocks
template <typename T>
__global__ void __launch_bounds__(kTimeTile<T>.threads, kTimeTile<T>.blocks_per_sm)
    fwd_time(const __grid_constant__ FwdParams p, const __grid_constant__ Cut cut) {
  constexpr Tile kTile = kTimeTile<T>;
  if (blockIdx.x >= cut.token_blocks) {
    return write_final_state<T>(p, global_thread() - cut.token_blocks * kTile.threads);
  }
  constexpr int kVector = kTile.vector;
  const auto [row, thread] = divide(global_thread(), cut.along_time);
  const auto [b, d] = divide(row, p.channels);
  if (b >= p.sequences.batch) return;
  const int64_t length = p.sequences.length;
  const Row<const T> x(static_cast<const T*>(p.x), p.x_stride, p.sequences, b, d);
  const Row<T> y(static_cast<T*>(p.y), p.y_stride, p.sequences, b, d);
  const int shift = vector_shift<kVector>(x);

  // All loads first: they are in flight together.
  Vector<T, kHalo> halo[kTile.count];
  Vector<T, kVector> own[kTile.count];
#pragma unroll
  for (int u = 0; u < kTile.count; ++u) {
    const int64_t tau = (thread + u * cut.along_time) * kVector - shift;
    if (tau >= length) continue;
    halo[u] = load_tokens<kHalo>(x, tau - kHalo, length);
    own[u] = load_tokens<kVector>(x, tau, length);
  }
  const Taps taps = load_taps(p, d);

#pragma unroll 1
  for (int u = 0; u < kTile.count; ++u) {
    const int64_t tau = (thread + u * cut.along_time) * kVector - shift;
    const int64_t stop = min(tau + kVector, length);
    // A piece: the tokens of this vector that belong to one span.
    for (int64_t begin = max(tau, int64_t{0}), end; begin < stop; begin = end) {
      const Span span = span_in_window<kPast + kVector>(p.sequences, b, begin, tau - kPast);
      end = min(span.end, stop);
      const Past past(p, b, d, span, begin, tau - kPast);
      float window[kPast + kVector];  // x_{tau - kPast} ...
#pragma unroll
      for (int i = 0; i < kPast; ++i) window[i] = to<float>(halo[0][kHalo - kPast + i]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) window[kPast + i] = to<float>(own[0][i]);
      past.replace_in(window);

      Vector<T, kVector> out;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        out[i] = span.padding ? static_cast<T>(0.0f) : output<T>(p, pre_of(taps, p.width, window, i));
      }
      store_tokens(y, tau, out, static_cast<int>(begin - tau), static_cast<int>(end - tau));
    }
    // The next vector moves up: an index that is known when the kernel runs would not be a register.
#pragma unroll
    for (int v = 1; v < kTile.count; ++v) halo[v - 1] = halo[v], own[v - 1] = own[v];
  }
}

// y_t = silu?(bias + sum_k weight_k x_{t-k}) [conv], channels contiguous, W <= 4
// block    lanes * vector channels x (threads / lanes) * count tokens of one batch row
// thread   `vector` channels x `count` tokens: all its tokens in registers, the kPast before them loaded once more
// shared   weights and bias of the block's channels
// bytes    per token: size read, size written (requested: kPast / count more reads, from L1)
// limits   B L D / (vector count threads) < 2^31 blocks
template <typename T>
__global__ void __launch_bounds__(kChannelTile<T>.threads, kChannelTile<T>.blocks_per_sm)
    fwd_channel(const __grid_constant__ FwdParams p, const __grid_constant__ Cut cut) {
  constexpr Tile kTile = kChannelTile<T>;
  if (blockIdx.x >= cut.token_blocks) {
    return write_final_state<T>(p, global_thread() - cut.token_blocks * kTile.threads);
  }
  constexpr int kVector = kTile.vector;
  const auto [row_block, channel_block] = divide(blockIdx.x, cut.along_channels);
  const auto [b, time_block] = divide(row_block, cut.along_time);
  const int lane = threadIdx.x % cut.lanes;
  const int64_t block_channel = channel_block * cut.lanes * kVector;
  const Lanes<kVector> lanes(p, cut, block_channel + lane * kVector);
  const int64_t tau = (time_block * (kTile.threads / cut.lanes) + threadIdx.x / cut.lanes) * kTile.count;
  const int64_t stop = min(tau + kTile.count, p.sequences.length);
  const Row<const T> x(static_cast<const T*>(p.x), p.x_stride, p.sequences, b, lanes.first);
  const Row<T> y(static_cast<T*>(p.y), p.y_stride, p.sequences, b, lanes.first);

  Vector<T, kVector> own[kTile.count];
#pragma unroll
  for (int i = 0; i < kTile.count; ++i) {
    own[i] = tau + i < stop ? lanes.load_from(x.at(tau + i)) : zeros<T, kVector>();
  }
  auto& shared = shared_memory<SharedTaps<32 * kVector>>();
  shared.fill(p, block_channel);
  __syncthreads();
  Taps taps[kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e) taps[e] = shared.at(lane * kVector + e);

  for (int64_t begin = tau, end; begin < stop; begin = end) {
    const Span span = span_in_window<kPast + kTile.count>(p.sequences, b, begin, tau - kPast);
    end = min(span.end, stop);
    const int first = static_cast<int>(begin - tau), last = static_cast<int>(end - tau);
    Window<kVector> window;
    enter(window, p, lanes, x, b, span, begin);
    T* token = y.at(tau);
#pragma unroll
    for (int i = 0; i < kTile.count; ++i, token += y.step) {
      if (i < first || i >= last) continue;
      Vector<T, kVector> out;
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        push<kVector>(window, e, to<float>(own[i][e]));
        out[e] = span.padding ? static_cast<T>(0.0f) : output<T>(p, pre_of(taps[e], p.width, window[e], 0));
      }
      lanes.store_to(token, out);
    }
  }
}

// y_t = silu?(bias + sum_j weight_j x_{t - (W-1-j) dilation}) [conv]
// block    `threads` neighbouring elements
// thread   one element of y; its W taps are loaded through the caches
// shared   none
// bytes    per token: size read, size written (requested: W times the reads)
// limits   B D L / threads < 2^31 blocks
template <typename T>
__global__ void __launch_bounds__(kGeneralTile<T>.threads, kGeneralTile<T>.blocks_per_sm)
    fwd_general(const __grid_constant__ FwdParams p, const __grid_constant__ Cut cut) {
  constexpr Tile kTile = kGeneralTile<T>;
  if (blockIdx.x >= cut.token_blocks) {
    return write_final_state<T>(p, global_thread() - cut.token_blocks * kTile.threads);
  }
  const Element at(p, global_thread());
  if (at.b >= p.sequences.batch) return;
  const Row<T> y(static_cast<T*>(p.y), p.y_stride, p.sequences, at.b, at.d);
  const int64_t oldest = at.tau - p.state_size();
  const Span span = span_at(p.sequences, at.b, at.tau, p.state_size(), 0);
  if (span.padding) return store(y.at(at.tau), static_cast<T>(0.0f));
  const int64_t initial = visible_initial_row(p, at.b, span, oldest);
  store(y.at(at.tau), output<T>(p, Channel<T>(p, at.b, at.d).pre(span, initial, at.tau)));
}

using Kernel = void (*)(FwdParams, Cut);

struct Instance {
  Path path;
  DType dtype;
  Kernel kernel;
};

constexpr Instance kInstances[] = {
    {Path::kTime, DType::kFloat32, fwd_time<float>},
    {Path::kTime, DType::kBFloat16, fwd_time<__nv_bfloat16>},
    {Path::kTime, DType::kFloat16, fwd_time<__half>},
    {Path::kChannel, DType::kFloat32, fwd_channel<float>},
    {Path::kChannel, DType::kBFloat16, fwd_channel<__nv_bfloat16>},
    {Path::kChannel, DType::kFloat16, fwd_channel<__half>},
    {Path::kGeneral, DType::kFloat32, fwd_general<float>},
    {Path::kGeneral, DType::kBFloat16, fwd_general<__nv_bfloat16>},
    {Path::kGeneral, DType::kFloat16, fwd_general<__half>},
    {Path::kGeneral, DType::kFloat64, fwd_general<double>},
};
static_assert(std::size(kInstances) == kFwdKernels);

}  // namespace

void fwd(const FwdParams& p, Stream stream) {
  const Plan plan = plan_fwd(p);
  const Instance& instance = find_instance(
      kInstances, plan.kernel, [&](const Instance& i) { return i.path == pick_path(p) && i.dtype == p.dtype; });
  launch({.name = plan.kernel,
          .grid = {plan.cut.token_blocks + plan.cut.state_blocks},
          .threads = plan.tile.threads,
          .smem_bytes = plan.smem_bytes,
          .stream = stream},
         instance.kernel, p, plan.cut);
}

}  // namespace seqkern::causal_conv1d::cuda

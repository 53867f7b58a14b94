// The forward: a scan, on one of the three paths of common/time_tile.h.
#include "common/launch.h"
#include "softmax_scan/scan.cuh"

namespace seqkern::softmax_scan::cuda {
namespace {

using time_scan::Cut;
using time_scan::Line;
using time_scan::Pass;
using time_scan::Place;

template <typename R>
struct Forward {
  using Real = R;
  using Carry = Sums<R>;
  using Element = Sums<R>;
  static constexpr int kTokens = fwd_tokens(kDType<R>);
  struct Tokens {
    R s[kTokens], v[kTokens];  // m_t and o_t in their place
    R n[kTokens];
  };

  __device__ __forceinline__ Forward(const FwdParams& params, int lanes, const Place& place)
      : p(params),
        channel(p, lanes, place.b, place.channel, place.exists),
        s_line(channel.scores(p.s, p.sequences)),
        v_line(channel.values(p.v, p.sequences)),
        o_line(channel.values(p.o, p.sequences)),
        normalizers_line(channel.normalizers(p.normalizers, p, p.sequences, channel.leads())) {}

  __device__ __forceinline__ void fetch(int64_t tau) { s.fetch(s_line, tau), v.fetch(v_line, tau); }
  __device__ __forceinline__ Tokens take() const {
    Tokens x;
    s.decode(s_line, [&](int i, R given) { x.s[i] = given; });
    v.decode(v_line, [&](int i, R given) { x.v[i] = given; });
    return x;
  }
  __device__ __forceinline__ void store(const Tokens& x, int64_t tau) const {
    time_scan::store_tokens(o_line, tau, x.v);
    if (!p.normalizers) return;
    Normalizers<R> normalizers[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) normalizers[i] = {x.s[i], x.n[i]};
    time_scan::store_tokens(normalizers_line, tau, normalizers);
  }

  __device__ __forceinline__ static Element identity() { return Sums<R>::empty(); }
  __device__ __forceinline__ static Element compose(const Element& later, const Element& earlier) {
    return merge(later, earlier);
  }
  __device__ __forceinline__ static Carry apply(const Element& f, const Carry& c) { return merge(f, c); }
  __device__ __forceinline__ static void advance(Carry& c, const Tokens& x, int i) {
    c = merge(token_of(x.s[i], x.v[i]), c);
  }
  __device__ __forceinline__ static void extend(Element& f, const Tokens& x, int i) { advance(f, x, i); }
  __device__ __forceinline__ void emit(Carry& c, Tokens& x, const time_scan::Token& t) const {
    advance(c, x, t.i);  // [max] [sum] [sumv]
    x.s[t.i] = c.m, x.n[t.i] = c.n;
    x.v[t.i] = c.n == R(0) ? R(0) : over(c.w, c.n);  // [out]
  }
  __device__ __forceinline__ void leave(const Carry& c, int64_t row) const {
    c.store_row(p.final_state, p, channel, row);
  }
  __device__ __forceinline__ static void pad(Tokens& x, int i) { x.s[i] = -kInfinity<R>, x.n[i] = x.v[i] = R(0); }

  __device__ __forceinline__ bool reads_initial() const { return static_cast<bool>(p.initial_state); }
  __device__ __forceinline__ bool reads_final() const { return static_cast<bool>(p.final_state); }
  __device__ __forceinline__ Carry initial(int64_t row, int64_t) const {
    return Sums<R>::load_row(p.initial_state, p, channel, row);
  }

  const FwdParams& p;
  Channel channel;
  Line s_line, v_line, o_line, normalizers_line;
  time_scan::Fetched<R, kTokens> s, v;
};

template <typename R>
constexpr Tile kTile = pick_fwd_tile(kDType<R>);

// m_t, n_t, w_t of [max] [sum] [sumv], and o_t = w_t / n_t [out]
// warp     32 channels of one batch row, from the first token to the last
// thread   one value of one head; chunks of tokens in registers, the next one on its way
// bytes    s, v, o once; normalizers once
// limits   B H lanes_of_head(V) / 128 < 2^31 blocks
template <typename R>
__global__ void __launch_bounds__(time_scan::kSerialWarps* kWarpSize, kTile<R>.serial_blocks)
    serial_kernel(const __grid_constant__ FwdParams p, const __grid_constant__ FwdPlan plan) {
  const Place place(plan.cut, p.heads * plan.lanes);
  if (!place.chain_exists) return;
  Forward<R> forward(p, plan.lanes, place);
  time_scan::serial_scan(forward, p.sequences, nullptr, false, place.b);
}

// The same with time cut.
// block    one tile: 32 channels of one batch row, 8 chunks of tokens
// warp     one chunk
// thread   one value of one head, in registers
// shared   the sums over the chunks
// bytes    s, v, o once; normalizers once; in a pass that summarizes s, v
// limits   tiles B H lanes_of_head(V) / 32 < 2^31 blocks
template <typename R>
__global__ void __launch_bounds__(time_scan::kTileWarps* kWarpSize, kTile<R>.tile_blocks)
    tile_kernel(const __grid_constant__ FwdParams p, const __grid_constant__ FwdPlan plan, const Pass pass) {
  const Place place(plan.cut, p.heads * plan.lanes);
  Forward<R> forward(p, plan.lanes, place);
  time_scan::tile_scan(forward, p.sequences, nullptr, false, place, plan.cut, p.workspace, pass);
}

// thread   one value of a final state (a head has at least one), of sequences without tokens: what entered
template <typename R>
__global__ void __launch_bounds__(kSmallThreads, 4) pass_kernel(const __grid_constant__ FwdParams p, const int lanes) {
  const auto [row, lane] = divide(global_thread(), p.heads * lanes);
  if (row >= p.sequences.count) return;
  const Span span = span_of_state(p.sequences, row, true, 0);
  if (span.begin < span.end) return;
  const Channel channel(p, lanes, 0, lane, true);
  Sums<R>::load_row(p.initial_state, p, channel, p.initial_state ? row : -1).store_row(p.final_state, p, channel, row);
}

__global__ void __launch_bounds__(kSmallThreads, 4) clear_kernel(const __grid_constant__ Cut cut, void* workspace) {
  time_scan::clear_flags(cut, workspace);
}

struct Instance {
  DType accumulator;
  void (*serial)(FwdParams, FwdPlan);
  void (*tile)(FwdParams, FwdPlan, Pass);
  void (*pass)(FwdParams, int);
};

constexpr Instance kInstances[] = {
    {DType::kFloat32, serial_kernel<float>, tile_kernel<float>, pass_kernel<float>},
    {DType::kFloat64, serial_kernel<double>, tile_kernel<double>, pass_kernel<double>},
};
static_assert(3 * std::size(kInstances) + 1 == kFwdKernels);

}  // namespace

void fwd(const FwdParams& p, Stream stream) {
  fwd(p, plan_fwd(p), stream);
}

void fwd(const FwdParams& p, const FwdPlan& plan, Stream stream) {
  const Instance& instance =
      find_instance(kInstances, "softmax_scan_fwd", [&](const Instance& i) { return i.accumulator == p.accumulator; });
  if (p.final_state && may_be_empty(p.sequences)) {
    const int64_t lanes = p.sequences.count * p.heads * plan.lanes;
    launch({.name = "softmax_scan_pass_states",
            .grid = {ceil_div(lanes, kSmallThreads)},
            .threads = kSmallThreads,
            .stream = stream},
           instance.pass, p, plan.lanes);
  }

  const Launch scan{.name = "softmax_scan_fwd",
                    .grid = {plan.cut.blocks},
                    .threads = plan.cut.threads,
                    .smem_bytes = plan.smem_bytes,
                    .stream = stream};
  time_scan::run_path(
      plan.cut, [&] { launch(scan, instance.serial, p, plan); },
      [&](Pass pass) { launch(scan, instance.tile, p, plan, pass); },
      [&] { clear_flags(plan.cut, p.workspace, stream); });
}

void clear_flags(const Cut& cut, void* workspace, Stream stream) {
  launch({.name = "softmax_scan_clear",
          .grid = {ceil_div(cut.blocks, kSmallThreads)},
          .threads = kSmallThreads,
          .stream = stream},
         clear_kernel, cut, workspace);
}

}  // namespace seqkern::softmax_scan::cuda

// The backward: a scan from the last token to the first, on one of the three paths of common/time_tile.h, and at most
// two launches that sum over lanes and warps.
#include "common/launch.h"
#include "softmax_scan/bwd.cuh"

namespace seqkern::softmax_scan::cuda {
namespace {

using time_scan::Cut;
using time_scan::Line;
using time_scan::Pass;
using time_scan::Place;

// What reaches a token t from itself and all later ones [dout] [dsum], relative to its own normalizers; R_ is a lane's
// part of the sum over V. e is a lane's part of what the final m gets, where m_t is that m already, else 0.
// One token alone is {m_t, n_t, 1 / n_t, do_t, do_t . o_t, 0}.
template <typename R>
struct Gradient {
  R m, n, inverse;
  R G, R_;
  R e;

  __device__ __forceinline__ static Gradient none() { return {kInfinity<R>, kInfinity<R>, R(0), R(0), R(0), R(0)}; }
};

// `later` in processing time, which is nearer to the sequence's first token. While it is empty, so are all that follow.
template <typename R>
__device__ __forceinline__ Gradient<R> reach(const Gradient<R>& later, const Gradient<R>& earlier) {
  const R r = exp_of(later.n == R(0) ? R(0) : later.m - earlier.m) * later.n * earlier.inverse;
  return {later.m,
          later.n,
          later.inverse,
          fma(r, earlier.G, later.G),
          fma(r, earlier.R_, later.R_),
          later.m == earlier.m ? earlier.e : R(0)};
}

// Sums over lanes, in shared memory of a warp.
template <typename R>
using LaneSums = R[bwd_tokens(kDType<R>)][kWarpSize + 1];

template <typename R>
struct Backward {
  using Real = R;
  using Carry = Gradient<R>;
  using Element = Gradient<R>;
  static constexpr int kTokens = bwd_tokens(kDType<R>);
  struct Tokens {
    R m[kTokens], n[kTokens];
    R s[kTokens], v[kTokens];   // ds and dv in their place
    R G[kTokens], R_[kTokens];  // do_t and do_t . o_t
    uint32_t rises;             // bit i: m is larger than that of the token before it, in time
  };

  // `summarize`: s and v are not wanted.
  __device__ __forceinline__ Backward(const BwdParams& params, const BwdPlan& plan, const Place& place,
                                      const Sequences& mirrored, bool summarize, LaneSums<R>& sums)
      : p(params),
        plan(plan),
        channel(p, plan.lanes, place.b, place.channel, place.exists),
        first_head(divide(place.channel - time_scan::lane_of(), plan.lanes).quotient),
        sums(sums),
        s_line(channel.scores(p.s, mirrored)),
        v_line(channel.values(p.v, mirrored)),
        do_line(channel.values(p.do_, mirrored)),
        o_line(channel.values(p.o, mirrored)),
        dv_line(channel.values(p.dv, mirrored)),
        normalizers_line(channel.normalizers(p.normalizers, p, mirrored, channel.head)) {
    if (summarize) s_line.length = v_line.length = 0;
  }

  __device__ __forceinline__ void fetch(int64_t tau) {
    s.fetch(s_line, tau), v.fetch(v_line, tau), do_.fetch(do_line, tau), o.fetch(o_line, tau);
    normalizers.fetch(normalizers_line, tau);
    before.fetch(normalizers_line, tau + kTokens);
  }
  __device__ __forceinline__ Tokens take() const {
    Tokens x;
    x.rises = 0;
    R m_before = R(0);
    before.decode(normalizers_line, [&](int, const Normalizers<R>& given) { m_before = given.m; });
    normalizers.decode(normalizers_line,
                       [&](int i, const Normalizers<R>& given) { x.m[i] = given.m, x.n[i] = given.n; });
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (x.m[i] > (i + 1 < kTokens ? x.m[i + 1] : m_before)) x.rises |= 1u << i;
    }
    s.decode(s_line, [&](int i, R given) { x.s[i] = given; });
    v.decode(v_line, [&](int i, R given) { x.v[i] = given; });
    do_.decode(do_line, [&](int i, R given) { x.G[i] = given; });
    o.decode(o_line, [&](int i, R given) { x.R_[i] = x.G[i] * given; });
    return x;
  }
  // ds_t is summed over the lanes of a head: of kTokens x 32 terms every lane adds kTokens, as many neighbours of one
  // token as a head has; what is left is added across lanes.
  __device__ __forceinline__ void store(const Tokens& x, int64_t tau) const {
    time_scan::store_tokens(dv_line, tau, x.v);
    const int lane = time_scan::lane_of(), lanes = min(plan.lanes, kWarpSize), terms = min(lanes, kTokens);
    const int columns_log2 = __ffs(kWarpSize / terms) - 1;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kTokens; ++i) sums[i][lane] = x.s[i];
    __syncwarp();
    for (int at = lane; at < kTokens << columns_log2; at += kWarpSize) {
      const int i = at >> columns_log2, first = (at - (i << columns_log2)) * terms;
      R sum = sums[i][first];
      for (int k = 1; k < terms; ++k) sum += sums[i][first + k];
      for (int distance = lanes / terms / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      }
      if (first % lanes == 0) store_score(sum, i, tau, first / lanes);
    }
  }

  __device__ __forceinline__ static Element identity() { return Gradient<R>::none(); }
  __device__ __forceinline__ static Carry apply(const Element& f, const Carry& c) {
    return f.inverse == R(0) ? c : reach(f, c);
  }
  __device__ __forceinline__ static Element compose(const Element& later, const Element& earlier) {
    return apply(later, earlier);
  }
  __device__ __forceinline__ static void advance(Carry& c, const Tokens& x, int i) {
    const R n = x.n[i], inverse = over(R(1), n == R(0) ? R(1) : n);
    c = reach({x.m[i], n, inverse, x.G[i], x.R_[i], R(0)}, c);  // [dout] [dsum]
  }
  __device__ __forceinline__ static void extend(Element& f, const Tokens& x, int i) { advance(f, x, i); }
  __device__ __forceinline__ void emit(Carry& c, Tokens& x, const time_scan::Token& t) const {
    advance(c, x, t.i);
    const R s_t = x.s[t.i], v_t = x.v[t.i], below = s_t == -kInfinity<R> ? s_t : s_t - c.m;
    const R p_t = exp_of(below) * c.inverse;
    const bool counts = p_t != R(0);
    bool rises = (x.rises >> t.i & 1u) != 0;
    if (t.last) rises = c.m > entering_m(t.row);
    x.v[t.i] = counts ? p_t * c.G : R(0);                                            // [dv]
    x.s[t.i] = (counts ? p_t * fma(v_t, c.G, -c.R_) : R(0)) + (rises ? c.e : R(0));  // [ds]
  }
  __device__ __forceinline__ static void pad(Tokens& x, int i) { x.s[i] = x.v[i] = R(0); }

  // The gradient of the initial state.
  __device__ __forceinline__ void leave(const Carry& c, int64_t row) const {
    if (!channel.head) return;
    const Sums<R> initial = Sums<R>::load_row(p.initial_state, p, channel, row);
    const bool counts = initial.m != -kInfinity<R>;
    const R q = counts ? exp_of(initial.m - c.m) * c.inverse : R(0);
    const R dw = counts ? q * c.G : R(0), dn = counts ? -q * c.R_ : R(0);
    if (channel.value) seqkern::store(p.dinitial_state.w, channel.value_of(p, row), dw);
    const R dm = fma(initial.n, dn, initial.w * dw) + (initial.m == c.m ? c.e : R(0));
    R* const states = reinterpret_cast<R*>(static_cast<unsigned char*>(p.workspace) + plan.states_at);
    seqkern::store(states + 2 * (channel.head_of(p, row) * plan.lanes + channel.i), Vector<R, 2>{{dm, dn}});
  }

  __device__ __forceinline__ bool reads_initial() const { return static_cast<bool>(p.dfinal_state); }
  __device__ __forceinline__ bool reads_final() const { return static_cast<bool>(p.dinitial_state); }

  // The final state is m of the last token, n = 1 and w times its n: what its gradients pass on is [dout] [dsum].
  __device__ __forceinline__ Carry initial(int64_t row, int64_t tau) const {
    Carry c = Gradient<R>::none();
    if (row < 0 || !channel.head) return c;
    const auto last =
        load<2>(static_cast<const R*>(p.normalizers) + 2 * (normalizers_line.first + tau * normalizers_line.step));
    c.m = last[0], c.inverse = R(1);
    if (channel.value) {
      const R o_last = load<R>(o_line.array, o_line.first + tau * o_line.step);
      c.G = load<R>(p.dfinal_state.w, channel.value_of(p, row));
      c.e = -last[1] * o_last * c.G;
    }
    if (channel.leads()) {
      c.R_ = -load<R>(p.dfinal_state.n, channel.head_of(p, row));
      c.e += fma(last[1], c.R_, load<R>(p.dfinal_state.m, channel.head_of(p, row)));
    }
    return c;
  }

  const BwdParams& p;
  const BwdPlan& plan;
  Channel channel;
  int64_t first_head;  // of the warp
  LaneSums<R>& sums;
  Line s_line, v_line, do_line, o_line, dv_line, normalizers_line;
  time_scan::Fetched<R, kTokens> s, v, do_, o;
  time_scan::Fetched<Normalizers<R>, kTokens> normalizers;
  time_scan::Fetched<Normalizers<R>, 1> before;

 private:
  // m of the state that enters the sequence whose gradient follows in row `row`.
  __device__ __forceinline__ R entering_m(int64_t row) const {
    return row < 0 || !channel.head ? -kInfinity<R> : load<R>(p.initial_state.m, channel.head_of(p, row));
  }

  // The sum over a warp's part of its head number `head`: to ds, or where a head has several warps to the workspace.
  __device__ __forceinline__ void store_score(R sum, int i, int64_t tau, int head) const {
    const int64_t h = first_head + head, at = tau + i, L = p.sequences.length;
    if (h >= p.heads || at >= L) return;
    const int64_t t = p.sequences.reverse ? at : L - 1 - at;
    if (plan.warps == 1)
      return seqkern::store(Array{p.ds.data, p.ds.dtype}, channel.b * p.ds.b + t * p.ds.l + h * p.ds.h, sum);
    R* const parts = reinterpret_cast<R*>(static_cast<unsigned char*>(p.workspace) + plan.sums_at);
    seqkern::store(parts + ((channel.b * L + t) * p.heads + h) * plan.warps + channel.i / kWarpSize, sum);
  }
};

template <typename R>
constexpr Tile kTile = pick_bwd_tile(kDType<R>);

template <typename R>
struct SerialShared {
  LaneSums<R> sums[time_scan::kSerialWarps];
};
template <typename R>
struct Shared {
  time_scan::TileShared<Backward<R>> tile;
  LaneSums<R> sums[time_scan::kTileWarps];
};

// G_t, R_t of [dout] [dsum], dv_t [dv] and ds_t [ds] from them
// warp     32 channels of one batch row, from the last token to the first
// thread   one value of one head; chunks of tokens in registers, the next one on its way
// shared   for sums over lanes
// bytes    s, v, do, o, normalizers once; ds, dv once
// limits   B H lanes_of_head(V) / 128 < 2^31 blocks
template <typename R>
__global__ void __launch_bounds__(time_scan::kSerialWarps* kWarpSize, kTile<R>.serial_blocks)
    serial_kernel(const __grid_constant__ BwdParams p, const __grid_constant__ BwdPlan plan) {
  const Place place(plan.cut, p.heads * plan.lanes);
  if (!place.chain_exists) return;
  auto& shared = shared_memory<SerialShared<R>>();
  const Sequences mirrored = time_scan::mirrored(p.sequences);
  Backward<R> backward(p, plan, place, mirrored, false, shared.sums[time_scan::warp_of()]);
  time_scan::serial_scan(backward, mirrored, nullptr, true, place.b);
}

// The same with time cut.
// block    one tile: 32 channels of one batch row, 8 chunks of tokens
// warp     one chunk
// thread   one value of one head, in registers
// shared   what chunks pass on; for sums over lanes
// bytes    as above; in a pass that summarizes do, o, normalizers
// limits   tiles B H lanes_of_head(V) / 32 < 2^31 blocks
template <typename R>
__global__ void __launch_bounds__(time_scan::kTileWarps* kWarpSize, kTile<R>.tile_blocks)
    tile_kernel(const __grid_constant__ BwdParams p, const __grid_constant__ BwdPlan plan, const Pass pass) {
  const Place place(plan.cut, p.heads * plan.lanes);
  auto& shared = shared_memory<Shared<R>>();
  const Sequences mirrored = time_scan::mirrored(p.sequences);
  Backward<R> backward(p, plan, place, mirrored, pass == Pass::kSummarize, shared.sums[time_scan::warp_of()]);
  time_scan::tile_scan(backward, mirrored, nullptr, true, place, plan.cut, p.workspace, pass);
}

struct Instance {
  DType accumulator;
  void (*serial)(BwdParams, BwdPlan);
  void (*tile)(BwdParams, BwdPlan, Pass);
};

constexpr Instance kInstances[] = {
    {DType::kFloat32, serial_kernel<float>, tile_kernel<float>},
    {DType::kFloat64, serial_kernel<double>, tile_kernel<double>},
};
static_assert(2 * std::size(kInstances) == kBwdKernels);

}  // namespace

void bwd(const BwdParams& p, Stream stream) {
  bwd(p, plan_bwd(p), stream);
}

void bwd(const BwdParams& p, const BwdPlan& plan, Stream stream) {
  const Instance& instance =
      find_instance(kInstances, "softmax_scan_bwd", [&](const Instance& i) { return i.accumulator == p.accumulator; });
  const Launch scan{.name = "softmax_scan_bwd",
                    .grid = {plan.cut.blocks},
                    .threads = plan.cut.threads,
                    .smem_bytes = plan.smem_bytes,
                    .stream = stream};
  time_scan::run_path(
      plan.cut, [&] { launch(scan, instance.serial, p, plan); },
      [&](Pass pass) { launch(scan, instance.tile, p, plan, pass); },
      [&] { clear_flags(plan.cut, p.workspace, stream); });
  bwd_reduce(p, plan, stream);
}

}  // namespace seqkern::softmax_scan::cuda

// The backward: the adjoint scan, which runs from the last token to the first, with da beside it.
#include "common/launch.h"
#include "common/reduce.cuh"
#include "linear_scan/scan.cuh"

namespace seqkern::linear_scan::cuda {
namespace {

using time_scan::Cut;
using time_scan::Line;
using time_scan::Pass;
using time_scan::Place;

// Sums over the lanes of a warp. Afterwards a lane has that of v[i], i = lane / (32 / kCount), in v[0].
template <typename R, int kCount>
__device__ __forceinline__ void sum_over_lanes(R (&v)[kCount]) {
  halving_sum<kWarpSize / 2, 1>(v);
}
template <typename R, int kCount>
__device__ __forceinline__ void sum_over_lanes(Complex<R> (&v)[kCount]) {
  R re[kCount], im[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) re[i] = v[i].re, im[i] = v[i].im;
  sum_over_lanes(re), sum_over_lanes(im);
  v[0] = {re[0], im[0]};
}

// g_t = dh_t + c_{t+1} = db_t, c_t = conj(a_t) g_t [dstate]; the state carried is c_t.
// da_t = conj(h_{t-1}) g_t, with log_space times conj(a_t) [da], into `da`: the gradient itself, or where that is
// summed numbers (B, times, columns).
template <typename S>
struct Adjoint : Maps<S> {
  using typename Maps<S>::Carry;
  using typename Maps<S>::Element;
  using typename Maps<S>::Real;
  static constexpr int kTokens = bwd_tokens(kDType<Real>, kIsComplex<S>);
  struct Tokens {
    S a[kTokens], g[kTokens], h[kTokens];  // g in place of dh, da in place of h_{t-1}
  };

  // `sequences` are mirrored.
  __device__ __forceinline__ Adjoint(const BwdParams& params, const Sequences& sequences, const DecaySums& sums,
                                     const Data& da, const Place& place, bool with_da)
      : p(params), s(sequences), sums(sums), da(da), place(place), with_da(with_da) {}

  __device__ __forceinline__ void fetch(int64_t tau) {
    a.fetch(line(p.a), tau), dh.fetch(line(p.dh), tau);
    if (with_da) h.fetch(line(p.h), tau + 1);
  }
  __device__ __forceinline__ Tokens take() const {
    Tokens x;
    take_decays(x.a, a, line(p.a), p.log_space);
    dh.decode(line(p.dh), [&](int i, S given) { x.g[i] = given; });
    if (with_da) h.decode(line(p.h), [&](int i, S given) { x.h[i] = given; });
    return x;
  }
  __device__ __forceinline__ void store(Tokens& x, int64_t tau) {
    time_scan::store_tokens(line(p.db), tau, x.g);
    if (!with_da) return;
    if (sums.over_time) {
      S of_chunk = x.h[0];
#pragma unroll
      for (int i = 1; i < kTokens; ++i) of_chunk = of_chunk + x.h[i];
      total = total + of_chunk;
    } else if (sums.over_channels) {
      sum_over_lanes(x.h);
      constexpr int kLanes = kWarpSize / kTokens;
      const int64_t token = tau + time_scan::lane_of() / kLanes;
      if (time_scan::lane_of() % kLanes == 0 && token < s.length) put(memory_place(s, token), x.h[0]);
    } else {
      time_scan::store_tokens(line(da), tau, x.h);
    }
  }

  __device__ __forceinline__ static void advance(Carry& c, const Tokens& x, int i) { c = conj(x.a[i]) * (x.g[i] + c); }
  __device__ __forceinline__ static void extend(Element& f, const Tokens& x, int i) {
    f.a = conj(x.a[i]) * f.a;
    advance(f.b, x, i);
  }
  __device__ __forceinline__ void emit(Carry& c, Tokens& x, const time_scan::Token& t) const {
    const S g = x.g[t.i] + c;
    x.g[t.i] = g;
    c = conj(x.a[t.i]) * g;
    if (with_da) {
      const S before = t.last ? entering : x.h[t.i];
      const bool constant = t.reset || (p.log_space && is_zero(x.a[t.i]));
      x.h[t.i] = constant ? S{} : conj(before) * (p.log_space ? c : g);
    }
    if (t.reset) c = S{};
  }
  __device__ __forceinline__ void expect(int64_t row) { entering = state(p.initial_state, with_da ? row : -1); }
  __device__ __forceinline__ static void pad(Tokens& x, int i) { x.g[i] = x.h[i] = S{}; }
  __device__ __forceinline__ void leave(const Carry& c, int64_t row) const {
    if (p.dinitial_state && place.exists)
      time_scan::store_number(p.dinitial_state, row * p.channels + place.channel, c);
  }

  __device__ __forceinline__ bool reads_initial() const { return static_cast<bool>(p.dfinal_state); }
  __device__ __forceinline__ bool reads_final() const { return static_cast<bool>(p.initial_state); }
  __device__ __forceinline__ Carry initial(int64_t row, int64_t) const { return state(p.dfinal_state, row); }

  // Sums over time, of a warp of the serial path or of a tile.
  __device__ __forceinline__ void put_total() {
    if (sums.over_channels) {
      S of_lane[1] = {total};
      sum_over_lanes(of_lane);
      if (time_scan::lane_of() == 0) put(place.tile, of_lane[0]);
    } else if (place.exists) {
      put(place.tile, total);
    }
  }

  S total{};

 private:
  __device__ __forceinline__ Line line(const Data& x) const { return line_of(x, s, place); }
  __device__ __forceinline__ S state(const Array& array, int64_t row) const {
    if (row < 0 || !place.exists) return S{};
    return time_scan::load_number<S>(array, row * p.channels + place.channel);
  }
  __device__ __forceinline__ void put(int64_t time, S sum) const {
    const int64_t column = sums.over_channels ? place.channel / time_scan::kChannels : place.channel;
    time_scan::store_number({da.data, kDType<Real>}, place.b * da.stride.b + time * da.stride.l + column, sum);
  }

  const BwdParams& p;
  const Sequences& s;
  const DecaySums& sums;
  const Data& da;
  const Place& place;
  const bool with_da;
  S entering{};  // h_0 of the sequence that ends next, which is its first token
  time_scan::Fetched<S, kTokens> a, dh, h;
};

// db_t, c_t [dstate], da_t [da]
// warp     32 channels of one batch row, from the last token to the first
// thread   one channel; chunks of tokens in registers, the next one on its way
// bytes    a, dh, h, db, da once
// limits   B D / 128 < 2^31 blocks
template <typename R, bool kComplex>
__global__ void __launch_bounds__(time_scan::kSerialWarps* kWarpSize, kTile.serial_blocks)
    serial_kernel(const __grid_constant__ BwdParams p, const __grid_constant__ Cut cut,
                  const __grid_constant__ DecaySums sums, const __grid_constant__ Data da) {
  const Place place(cut, p.channels);
  if (!place.chain_exists) return;
  const Sequences s = time_scan::mirrored(p.sequences);
  Adjoint<Scalar<R, kComplex>> adjoint(p, s, sums, da, place, static_cast<bool>(p.h));
  time_scan::serial_scan(adjoint, s, p.reset, true, place.b);
  if (sums.over_time) adjoint.put_total();
}

// The same with time cut.
// block    one tile: 32 channels of one batch row, 8 chunks of tokens
// warp     one chunk
// thread   one channel of it, in registers
// shared   what the chunks do to a gradient; then their sums of da
// bytes    a, dh, h, db, da once; in a pass that summarizes a, dh
// limits   tiles B D / 32 < 2^31 blocks
template <typename R, bool kComplex>
__global__ void __launch_bounds__(time_scan::kTileWarps* kWarpSize, kTile.tile_blocks)
    tile_kernel(const __grid_constant__ BwdParams p, const __grid_constant__ Cut cut,
                const __grid_constant__ DecaySums sums, const __grid_constant__ Data da, const Pass pass) {
  using S = Scalar<R, kComplex>;
  struct Totals {
    S of_warp[time_scan::kTileWarps][kWarpSize];
  };
  const Place place(cut, p.channels);
  const Sequences s = time_scan::mirrored(p.sequences);
  Adjoint<S> adjoint(p, s, sums, da, place, p.h && pass != Pass::kSummarize);
  time_scan::tile_scan(adjoint, s, p.reset, true, place, cut, p.workspace, pass);
  if (!sums.over_time || pass == Pass::kSummarize) return;

  __syncthreads();
  auto& totals = shared_memory<Totals>();
  const int warp = time_scan::warp_of(), lane = time_scan::lane_of();
  totals.of_warp[warp][lane] = adjoint.total;
  __syncthreads();
  if (warp > 0) return;
  for (int w = 1; w < time_scan::kTileWarps; ++w) adjoint.total = adjoint.total + totals.of_warp[w][lane];
  adjoint.put_total();
}

struct Instance {
  DType accumulator;
  bool complex;
  void (*serial)(BwdParams, Cut, DecaySums, Data);
  void (*tile)(BwdParams, Cut, DecaySums, Data, Pass);
};

constexpr Instance kInstances[] = {
    {DType::kFloat32, false, serial_kernel<float, false>, tile_kernel<float, false>},
    {DType::kFloat32, true, serial_kernel<float, true>, tile_kernel<float, true>},
    {DType::kFloat64, false, serial_kernel<double, false>, tile_kernel<double, false>},
    {DType::kFloat64, true, serial_kernel<double, true>, tile_kernel<double, true>},
};
static_assert(2 * std::size(kInstances) == kBwdKernels);

}  // namespace

void bwd(const BwdParams& p, Stream stream) {
  bwd(p, plan_bwd(p), stream);
}

void bwd(const BwdParams& p, const BwdPlan& plan, Stream stream) {
  const Instance& instance = find_instance(kInstances, "linear_scan_bwd", [&](const Instance& i) {
    return i.accumulator == p.accumulator && i.complex == p.complex;
  });
  if (p.dinitial_state && may_be_empty(p.sequences)) pass_states(p, p.dfinal_state, p.dinitial_state, stream);

  const DecaySums& sums = plan.sums;
  const Data da = sums ? partial_sums(p, plan) : p.da;
  const Launch scan{.name = "linear_scan_bwd",
                    .grid = {plan.cut.blocks},
                    .threads = plan.cut.threads,
                    .smem_bytes = plan.smem_bytes,
                    .stream = stream};
  time_scan::run_path(
      plan.cut, [&] { launch(scan, instance.serial, p, plan.cut, sums, da); },
      [&](Pass pass) { launch(scan, instance.tile, p, plan.cut, sums, da, pass); },
      [&] { clear_flags(plan.cut, p.workspace, stream); });
  if (sums) bwd_reduce(p, plan, stream);
}

}  // namespace seqkern::linear_scan::cuda

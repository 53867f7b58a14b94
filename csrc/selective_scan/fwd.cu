// The forward: one launch, or three where time is cut into segments.
#include "common/launch.h"
#include "selective_scan/tile.h"
#include "selective_scan/warp.cuh"

namespace seqkern::selective_scan::cuda {
namespace {

template <typename R, bool kPlain>
constexpr FwdTile kTile = pick_fwd_tile(kDType<R>, kPlain);

template <typename S, int kStateLanes, bool kPlain>
struct Shared {
  static constexpr int kSlice = Lane<S, kStateLanes>::kSlice;
  ProjectionTile<S, kSlice> B, C;
  struct Warp {
    DataTile<Real<S>> delta, u, z, out;
  } warp[kTile<Real<S>, kPlain>.warps];
};

// Registers of a lane while it walks through a tile. A summary is what a segment does to a state that enters it: h
// becomes decay h + what the tokens add. The decay is NaN where a sequence begins in the segment and nothing of h is
// left: a decay that is NaN by itself has made NaN of what the tokens add as well.
template <typename S, int kStateLanes, bool kPlain>
struct Scan {
  using L = Lane<S, kStateLanes>;
  using R = typename L::R;
  typename L::States A, h;
  typename L::States decays;  // of a summary: their product

  // Tokens [first, last) of the tile, of one sequence.
  template <bool kSummary, typename SharedTiles, typename WarpTiles>
  __device__ __forceinline__ void walk(const Inputs& in, const L& lane, const SharedTiles& shared, WarpTiles& mine,
                                       int first, int last, bool first_slice) {
#pragma unroll 1
    for (int t = first; t < last;) {
      if (kTogether > 1 && t % kTogether == 0 && t + kTogether <= last) {
        walk_together<kSummary, kTogether>(in, lane, shared, mine, t, first_slice), t += kTogether;
      } else {
        walk_together<kSummary, 1>(in, lane, shared, mine, t, first_slice), t += 1;
      }
    }
  }

 private:
  static constexpr int kTogether = kPlain ? 4 : 1;  // tokens whose sums are taken at once, so that more is under way

  template <bool kSummary, int kCount, typename SharedTiles, typename WarpTiles>
  __device__ __forceinline__ void walk_together(const Inputs& in, const L& lane, const SharedTiles& shared,
                                                WarpTiles& mine, int first, bool first_slice) {
    const int of_channels = place(first, lane.channel), of_lane = place(first, lane.lane);
    R out[kCount][L::kChannels];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const auto delta = load<L::kChannels>(mine.delta.value + of_channels + i * kWarpChannels);
      const auto u = load<L::kChannels>(mine.u.value + of_channels + i * kWarpChannels);
#pragma unroll
      for (int c = 0; c < L::kChannels; ++c) {
        const int row_B = !kPlain && in.B.constant() ? lane.channel + c : first + i;
        const int row_C = !kPlain && in.C.constant() ? lane.channel + c : first + i;
        const auto B = load<L::kStates>(shared.B.value[row_B] + lane.state);
        const auto C = load<L::kStates>(shared.C.value[row_C] + lane.state);
        const R delta_u = delta[c] * u[c];
        out[i][c] = R(0);
#pragma unroll
        for (int n = 0; n < L::kStates; ++n) {
          const S a = decay(delta[c], A[c][n], !kPlain && in.two_exp);
          h[c][n] = fma(a, h[c][n], delta_u * B[n]);  // [state]
          if constexpr (kSummary) {
            decays[c][n] = a * decays[c][n];
          } else {
            out[i][c] = fma_real(C[n], h[c][n], out[i][c]);  // [out]
          }
        }
      }
    }
    if constexpr (!kSummary) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        halving_sum<kStateLanes / 2, 1>(out[i]);
        R& sum = mine.out.value[of_lane + i * kWarpChannels];
        sum = first_slice ? out[i][0] : sum + out[i][0];
      }
    }
  }
};

// y_t = out_t silu(z_t) in place of out, which holds sum_n C_t h_t [out]. A lane takes one channel.
template <typename S>
__device__ __forceinline__ void finish(DataTile<Real<S>>& out, const DataTile<Real<S>>& u, const DataTile<Real<S>>& z,
                                       const Inputs& in, const WarpPlace& warp, uint32_t padding) {
  using R = Real<S>;
  const int lane = threadIdx.x % kWarpSize;
  const R D = in.D && lane < warp.count ? load<R>(in.D, warp.channel + lane) : R(0);
  const auto apply = [&](auto gate) {
    for_each_in_column<R>(lane, [&](int t, int at) {
      const R sum = kIsComplex<S> ? R(2) * out.value[at] : out.value[at];
      const R y = (in.D ? fma(D, u.value[at], sum) : sum) * gate(at);
      out.value[at] = padding >> t & 1u ? R(0) : y;
    });
  };
  in.z ? apply([&](int at) { return z.value[at] * sigmoid(z.value[at]); }) : apply([](int) { return R(1); });
}

// h_t = a_t h_{t-1} + delta'_t u_t B_t [state], y_t = (sum_n C_t h_t + D u_t) silu(z_t) [out]
// block    one batch row, up to 4 x 32 channels of a piece (32 if not kPlain), one segment of time
// warp     32 channels: all states slice by slice, tile by tile (warp_tile.h)
// thread   a few channels and states of each, in registers; time is sequential
// shared   B and C of a tile and slice, for all warps; delta', u and out of a tile for each warp
// bytes    u, delta, z, y once; B, C once per block. To summarize: u and delta once, B once per block
// limits   B segments D / 32 < 2^31 blocks
template <typename R, bool kComplex, int kStateLanes, bool kPlain>
__global__ void __launch_bounds__(kTile<R, kPlain>.warps* kWarpSize, kTile<R, kPlain>.blocks_per_sm)
    fwd_kernel(const __grid_constant__ FwdParams p, const __grid_constant__ Cut cut, const bool summarize) {
  using S = Scalar<R, kComplex>;
  using L = Lane<S, kStateLanes>;
  const BlockPlace block(p, cut);
  const WarpPlace warp(block);
  const L lane;
  auto& shared = shared_memory<Shared<S, kStateLanes, kPlain>>();
  auto& mine = shared.warp[threadIdx.x / kWarpSize];
  const int64_t slices = ceil_div(p.states, L::kSlice);
  const int64_t segment = block.b * cut.segments + block.segment;
  R* const states = static_cast<R*>(p.workspace);
  R* const decays = states + segment_elements(p, cut);
  Scan<S, kStateLanes, kPlain> scan;

  for (int64_t tile = block.first_tile; tile < block.last_tile; ++tile) {
    const TimeTile time(p.sequences, tile);
    const Marks marks(p.sequences, block.b, time);
#pragma unroll 1
    for (int i = 0; i < (!summarize && p.z ? 3 : 2); ++i) {
      load_tile(i == 0 ? mine.delta : i == 1 ? mine.u : mine.z, i == 0 ? p.delta : i == 1 ? p.u : p.z, warp, time);
    }
    __syncwarp();
    apply_softplus(mine.delta, p, warp, time);

    for (int64_t slice = 0; slice < slices; ++slice) {
      __syncthreads();
#pragma unroll 1
      for (int i = 0; i < (summarize ? 1 : 2); ++i) {
        const Projection& x = i == 0 ? p.B : p.C;
        auto& of_slice = i == 0 ? shared.B : shared.C;
        if (kPlain || !x.constant())
          of_slice.load_from(x, p, block.b, block.channel, slice, time);
        else
          load_constant(of_slice, x, p, block, slice);
      }
      __syncthreads();
      if (warp.count == 0) continue;

      if (tile == block.first_tile || slices > 1) {
        lane.load_A(scan.A, p, warp, slice);
        const bool enters = tile == block.first_tile && (summarize || block.segment == 0);
        if (enters) {
          L::fill(scan.h, R(0));
          if (summarize) L::fill(scan.decays, R(1));
        } else {
          lane.load_state(scan.h, p, cut, warp, slice, states, segment);
          if (summarize) lane.load_state(scan.decays, p, cut, warp, slice, decays, segment);
        }
      }
      if (!summarize && p.checkpoints) {
        lane.store_state(scan.h, p, cut, warp, slice, p.checkpoints, block.b * num_chunks(p.sequences) + tile);
      }

      for (int t = 0, end; t < time.count; t = end) {
        end = marks.piece_end(t, time.count);
        if (marks.begins >> t & 1u) {
          const int64_t row = p.initial_state ? marks.initial_row(p.sequences, block.b, time, t) : -1;
          lane.load_row(scan.h, p, warp, slice, p.initial_state, row);
          if (summarize) L::fill(scan.decays, static_cast<R>(NAN));
        }
        if (!(marks.padding >> t & 1u)) {
          summarize ? scan.template walk<true>(p, lane, shared, mine, t, end, slice == 0)
                    : scan.template walk<false>(p, lane, shared, mine, t, end, slice == 0);
        }
        if (!summarize && p.last_state && (marks.ends >> (end - 1) & 1u)) {
          const int64_t row = marks.final_row(p.sequences, block.b, time, end - 1);
          if (row >= 0) lane.store_row(scan.h, p, warp, slice, {p.last_state.data, kDType<R>}, row);
        }
      }

      if (slices > 1 || (summarize && tile + 1 == block.last_tile)) {
        lane.store_state(scan.h, p, cut, warp, slice, states, segment);
        if (summarize) lane.store_state(scan.decays, p, cut, warp, slice, decays, segment);
      }
    }

    if (!summarize) {
      __syncwarp();
      finish<S>(mine.out, mine.u, mine.z, p, warp, marks.padding);
      __syncwarp();
      store_tile(mine.out, p.y, warp, time);
    }
    __syncwarp();
  }
}

// From what every segment does to a state or a gradient, those that enter them, in place (warp.cuh).
// thread   one state of one channel and batch row; segments one after another
template <typename S>
__global__ void __launch_bounds__(kCarryThreads, 2)
    carry_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Cut cut, void* workspace,
                 const int64_t states_at, const int64_t decays_at, const bool last_first) {
  using R = Real<S>;
  constexpr int kParts = sizeof(S) / sizeof(R), kAtOnce = 16 / sizeof(S);  // segments whose loads are in flight
  const auto [bn, d] = divide(global_thread(), in.channels);
  const auto [b, n] = divide(bn, in.states);
  if (b >= in.sequences.batch) return;
  const int64_t row = in.states * kParts * in.channels, step = last_first ? -row : row;
  const int64_t first_segment = b * cut.segments + (last_first ? cut.segments - 1 : 0);
  const int64_t start = first_segment * row + n * kParts * in.channels + d;
  R* const states = static_cast<R*>(workspace) + states_at + start;
  const R* const decays = static_cast<R*>(workspace) + decays_at + start;
  const auto load_scalar = [&](const R* from) -> S {
    if constexpr (kIsComplex<S>)
      return {load(from), load(from + in.channels)};
    else
      return load(from);
  };

  S entering = S(R(0));
  for (int64_t first = 0; first < cut.segments; first += kAtOnce) {
    S added[kAtOnce], decay[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= cut.segments) continue;
      added[i] = load_scalar(states + (first + i) * step), decay[i] = load_scalar(decays + (first + i) * step);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= cut.segments) continue;
      R* to = states + (first + i) * step;
      bool nothing_left;
      if constexpr (kIsComplex<S>) {
        store(to, entering.re), store(to + in.channels, entering.im);
        nothing_left = isnan(decay[i].re) || (entering.re == R(0) && entering.im == R(0));
      } else {
        store(to, entering);
        nothing_left = isnan(decay[i]) || entering == R(0);
      }
      entering = nothing_left ? added[i] : fma(decay[i], entering, added[i]);
    }
  }
}

// thread   one element of the states
__global__ void __launch_bounds__(kCarryThreads, 4)
    pass_kernel(const __grid_constant__ Inputs in, const __grid_constant__ Array from,
                const __grid_constant__ Array to) {
  const auto [row, i] = divide(global_thread(), in.channels * in.states * in.parts());
  if (row >= in.sequences.count) return;
  const Span span = span_of_state(in.sequences, row, true, 0);
  if (span.begin < span.end) return;
  store(to, global_thread(), from ? load<double>(from, global_thread()) : 0.0);  // fp64 holds every type
}

struct Instance {
  Kind kind;
  void (*scan)(FwdParams, Cut, bool);
  void (*carry)(Inputs, Cut, void*, int64_t, int64_t, bool);
};

constexpr Instance kInstances[] = {
    {Kind::kSlice4, fwd_kernel<float, false, 1, true>, carry_kernel<float>},
    {Kind::kSlice8, fwd_kernel<float, false, 2, true>, carry_kernel<float>},
    {Kind::kSlice16, fwd_kernel<float, false, 4, true>, carry_kernel<float>},
    {Kind::kGeneral, fwd_kernel<float, false, 4, false>, carry_kernel<float>},
    {Kind::kDouble, fwd_kernel<double, false, 4, false>, carry_kernel<double>},
    {Kind::kComplex, fwd_kernel<float, true, 4, false>, carry_kernel<Complex<float>>},
    {Kind::kComplexDouble, fwd_kernel<double, true, 4, false>, carry_kernel<Complex<double>>},
};
static_assert(std::size(kInstances) + 4 + 1 == kFwdKernels);

const Instance& instance_of(Kind kind) {
  return find_instance(kInstances, "selective_scan_fwd", [&](const Instance& i) { return i.kind == kind; });
}

}  // namespace

void fwd(const FwdParams& p, Stream stream) {
  const FwdPlan plan = plan_fwd(p);
  const Instance& instance = instance_of(plan.kind);
  if (p.last_state && (p.sequences.cu_seqlens || p.sequences.seq_idx || p.sequences.length == 0)) {
    pass_states(p, p.initial_state, p.last_state, stream);
  }
  const Launch scan{.name = "selective_scan_fwd",
                    .grid = {plan.blocks},
                    .threads = plan.cut.warps * kWarpSize,
                    .smem_bytes = plan.smem_bytes,
                    .stream = stream};
  if (plan.cut.segments > 1) {
    launch(scan, instance.scan, p, plan.cut, true);
    carry_over_segments(p, plan.cut, p.workspace, 0, segment_elements(p, plan.cut), false, stream);
  }
  launch(scan, instance.scan, p, plan.cut, false);
}

void carry_over_segments(const Inputs& in, const Cut& cut, void* workspace, int64_t states, int64_t decays,
                         bool last_first, Stream stream) {
  launch({.name = "selective_scan_carry",
          .grid = {ceil_div(in.sequences.batch * in.states * in.channels, kCarryThreads)},
          .threads = kCarryThreads,
          .stream = stream},
         instance_of(pick_kind(in)).carry, in, cut, workspace, states, decays, last_first);
}

void pass_states(const Inputs& in, const Array& from, const Array& to, Stream stream) {
  const int64_t elements = in.sequences.count * in.channels * in.states * in.parts();
  launch({.name = "selective_scan_pass_states",
          .grid = {ceil_div(elements, kCarryThreads)},
          .threads = kCarryThreads,
          .stream = stream},
         pass_kernel, in, from, to);
}

}  // namespace seqkern::selective_scan::cuda

// Before the backward of a batch that is cut in time: the gradients that enter the segments from the following ones.
#include "common/launch.h"
#include "selective_scan/bwd.cuh"

namespace seqkern::selective_scan::cuda {
namespace {

constexpr int kLanes = 4;  // over states

template <typename S_>
struct Leaving {  // stands in for Config
  using S = S_;
  using R = Real<S>;
  using L = Lane<S, kLanes>;
  static constexpr bool kPlain = false;
};

template <typename S>
struct Shared {
  ProjectionTile<S, Lane<S, kLanes>::kSlice> C;
  DataTile<Real<S>> delta, dout, z;
};

// What a segment makes of a gradient that enters it: it leaves as decay carry + what its tokens add, which is
// conj(a_t) g_t [dstate] of its first token. The decay is NaN where a sequence ends in the segment: nothing is left of
// what enters.
// block    one warp: 32 channels of one batch row and segment, walked through backwards
// thread   4 channels and a few states of each; slices of states one after another
// shared   delta', dout and C of a tile
// bytes    delta, dy, z and C once for each slice of states
// limits   B segments D / 32 < 2^31 blocks
template <typename S>
__global__ void __launch_bounds__(kWarpSize, 8)
    leave_kernel(const __grid_constant__ BwdParams p, const __grid_constant__ Cut cut,
                 const __grid_constant__ BwdWorkspace w) {
  using R = Real<S>;
  using L = Lane<S, kLanes>;
  const BlockPlace block(p, cut);
  const WarpPlace warp(block);
  const L lane;
  auto& shared = shared_memory<Shared<S>>();
  const int64_t segment = block.b * cut.segments + block.segment;
  typename L::States A, carry, decays;

  for (int64_t slice = 0; slice * L::kSlice < p.states; ++slice) {
    lane.load_A(A, p, warp, slice);
    L::fill(carry, R(0)), L::fill(decays, R(1));
    for (int64_t at = block.last_tile - 1; at >= block.first_tile; --at) {
      const TimeTile time(p.sequences, at);
      const Marks marks(p.sequences, block.b, time);
      __syncthreads();
#pragma unroll 1
      for (int i = 0; i < 3; ++i) {
        const Data& x = i == 0 ? p.delta : i == 1 ? p.dy : p.z;
        if (x) load_tile(i == 0 ? shared.delta : i == 1 ? shared.dout : shared.z, x, warp, time);
      }
      if (p.C.constant())
        load_constant(shared.C, p.C, p, block, slice);
      else
        shared.C.load_from(p.C, p, block.b, block.channel, slice, time);
      __syncthreads();
      apply_softplus(shared.delta, p, warp, time);
      if (p.z) apply_gate(shared.dout, shared.z);
      __syncwarp();

      for (int end = time.count, begin; end > 0; end = begin) {
        begin = marks.piece_begin(end - 1);
        if (marks.padding >> begin & 1u) continue;
        if (marks.ends >> (end - 1) & 1u) {
          const int64_t row = p.dlast_state ? marks.final_row(p.sequences, block.b, time, end - 1) : -1;
          lane.load_row(carry, p, warp, slice, {p.dlast_state.data, kDType<R>}, row);
          L::fill(decays, static_cast<R>(NAN));
        }
#pragma unroll 2
        for (int t = end - 1; t >= begin; --t) {
          const auto delta = shared.delta.template at<L::kChannels>(t, lane.channel);
          const auto dout = shared.dout.template at<L::kChannels>(t, lane.channel);
          const ProjectionAt<Leaving<S>> C(shared.C, p.C, lane, t);
#pragma unroll
          for (int c = 0; c < L::kChannels; ++c) {
#pragma unroll
            for (int n = 0; n < L::kStates; ++n) {
              const S a = conj(decay(delta[c], A[c][n], p.two_exp));
              carry[c][n] = a * fma((kIsComplex<S> ? R(2) : R(1)) * dout[c], conj(C[c][n]), carry[c][n]);
              decays[c][n] = a * decays[c][n];
            }
          }
        }
      }
    }
    R* const workspace = static_cast<R*>(p.workspace);
    lane.store_state(carry, p, cut, warp, slice, workspace + w.carry, segment);
    lane.store_state(decays, p, cut, warp, slice, workspace + w.decay, segment);
  }
}

using Kernel = void (*)(BwdParams, Cut, BwdWorkspace);

struct Instance {
  bool is_double, complex;
  Kernel kernel;
  int64_t smem_bytes;
};

template <typename S>
constexpr Instance instance() {
  return {sizeof(Real<S>) == 8, kIsComplex<S>, leave_kernel<S>, sizeof(Shared<S>)};
}

constexpr Instance kInstances[] = {instance<float>(), instance<double>(), instance<Complex<float>>(),
                                   instance<Complex<double>>()};
static_assert(std::size(kInstances) == kBwdCarryKernels);

}  // namespace

void bwd_carry(const BwdParams& p, const BwdPlan& plan, Stream stream) {
  const bool is_double = p.accumulator == DType::kFloat64;
  const Instance& instance = find_instance(kInstances, "selective_scan_bwd_carry", [&](const Instance& i) {
    return i.is_double == is_double && i.complex == p.complex;
  });
  Cut cut = cut_of(p, 1);  // the same segments
  cut.vectorized = cut.piece % kLanes == 0;
  launch({.name = "selective_scan_bwd_leave",
          .grid = {blocks_of(p, cut)},
          .threads = kWarpSize,
          .smem_bytes = instance.smem_bytes,
          .stream = stream},
         instance.kernel, p, cut, plan.workspace);
  carry_over_segments(p, cut, p.workspace, plan.workspace.carry, plan.workspace.decay, true, stream);
}

}  // namespace seqkern::selective_scan::cuda

// The backward: one launch that walks back through time, before it two where time is cut into segments (bwd_carry.cu),
// after it two that add up what blocks have found (bwd_reduce.cu).
#include "common/launch.h"
#include "selective_scan/bwd_scan.cuh"

namespace seqkern::selective_scan::cuda {
namespace {

// Of one batch row and segment: rows of accumulators in the workspace.
template <typename R>
struct Rows {
  R *carry, *dA, *dB, *dC, *dD, *ddelta_bias;

  __device__ __forceinline__ Rows(const BwdParams& p, const BwdWorkspace& w)
      : carry(static_cast<R*>(p.workspace) + w.carry),
        dA(static_cast<R*>(p.workspace) + w.dA),
        dB(static_cast<R*>(p.workspace) + w.dB),
        dC(static_cast<R*>(p.workspace) + w.dC),
        dD(static_cast<R*>(p.workspace) + w.dD),
        ddelta_bias(static_cast<R*>(p.workspace) + w.ddelta_bias) {}
};

// Adds what a piece has summed up for parameters to the segment's sums in the workspace, and starts from zero again: so
// that a long row does not round every token's part to the size of the whole sum.
template <typename C>
__device__ __forceinline__ void add_sums(Scan<C>& scan, const Rows<typename C::R>& rows, const Cut& cut,
                                         const WarpPlace& warp, int64_t slice, int64_t row) {
  using L = typename C::L;
  const BwdParams& p = scan.p;
  const auto add = [&](typename L::States& of_piece, typename C::R* to) {
    typename L::States sum;
    scan.lane.load_state(sum, p, cut, warp, slice, to, row);
    Scan<C>::for_each([&](int c, int n) { sum[c][n] = sum[c][n] + of_piece[c][n]; });
    scan.lane.store_state(sum, p, cut, warp, slice, to, row);
  };
  add(scan.dA, rows.dA);
  if (!C::kPlain && p.B.constant()) add(scan.dB, rows.dB);
  if (!C::kPlain && p.C.constant()) add(scan.dC, rows.dC);
  if (scan.last_slice) {
#pragma unroll
    for (int bit = L::kChannels; bit < C::kStateLanes; bit *= 2) {
      scan.dD += __shfl_xor_sync(0xffffffffu, scan.dD, bit);
      scan.ddelta_bias += __shfl_xor_sync(0xffffffffu, scan.ddelta_bias, bit);
    }
    if (scan.own_token == 0 && scan.own_channel < warp.count) {
      const int64_t d = row * p.channels + warp.channel + scan.own_channel;
      store(rows.dD + d, load(rows.dD + d) + scan.dD);
      store(rows.ddelta_bias + d, load(rows.ddelta_bias + d) + scan.ddelta_bias);
    }
  }
  scan.clear_parameters();
}

// Zeros there, by the threads that add to them.
template <typename C>
__device__ __forceinline__ void clear_sums(const Scan<C>& scan, const Rows<typename C::R>& rows, const Cut& cut,
                                           const WarpPlace& warp, int64_t slices, int64_t row) {
  const BwdParams& p = scan.p;
#pragma unroll 1
  for (int64_t slice = 0; slice < slices; ++slice) {
    scan.lane.store_state(scan.dA, p, cut, warp, slice, rows.dA, row);
    if (!C::kPlain && p.B.constant()) scan.lane.store_state(scan.dB, p, cut, warp, slice, rows.dB, row);
    if (!C::kPlain && p.C.constant()) scan.lane.store_state(scan.dC, p, cut, warp, slice, rows.dC, row);
  }
  if (scan.own_token > 0 || scan.own_channel >= warp.count) return;
  const int64_t d = row * p.channels + warp.channel + scan.own_channel;
  store(rows.dD + d, scan.dD), store(rows.ddelta_bias + d, scan.ddelta_bias);
}

// The block's sums of dB or dC over its channels: its warps' in order.
template <typename C>
__device__ __forceinline__ void store_channel_sums(const Shared<C>& shared, const BwdParams& p, const BwdWorkspace& w,
                                                   const Cut& cut, const BlockPlace& block, int64_t slice,
                                                   const TimeTile& time) {
  using R = typename C::R;
  using L = typename C::L;
  const auto [piece, channel] = divide(block.channel, cut.piece);
  const int64_t channel_block = piece * cut.blocks + channel / (cut.warps * kWarpChannels);
  const int64_t row = (channel_block * p.sequences.batch + block.b) * p.states;
#pragma unroll 1
  for (int i = threadIdx.x; i < C::kSums * kTokens; i += blockDim.x) {
    const int t = time.token(i % kTokens), j = i / kTokens, half = C::kSums / 2;
    const bool is_C = j >= half;
    const int64_t s = slice * L::kSlice + j % half / L::kParts;
    if (!time.has(t) || s >= p.states || (is_C ? p.C : p.B).constant()) continue;
    R sum = R(0);
#pragma unroll 1
    for (int warp = 0; warp < cut.warps * C::kTile.sharing; ++warp) sum += shared.warp[warp].sums[t][j];
    const int64_t at = (row + s) * p.sequences.length + memory_place(p.sequences, time.tau + t);
    store(static_cast<R*>(p.workspace) + (is_C ? w.dC : w.dB) + at * L::kParts + j % L::kParts, sum);
  }
}

// All gradients of tokens; those of parameters over the block's segment, dB and dC over its channels. The equations
// stand in Scan.
// block    one batch row, up to 2 x 32 channels of a piece, one segment of time, walked through backwards
// warp     32 channels, or 16 where two warps share 32; states slice by slice
// thread   a few channels and states of each; states and decays of a window of 8 tokens in registers
// shared   B and C of a tile and slice; delta', u, dout and dz of a tile; states before each window; sums of dB and dC
// bytes    u, delta, z, dy, du, ddelta, dz and checkpoints once; B, C and sums of dB, dC once per block; sums for
//          parameters once per tile, to the L2 cache
// limits   B segments D / 64 < 2^31 blocks
template <typename C>
__global__ void __launch_bounds__(C::kWarps* kWarpSize, C::kTile.blocks_per_sm)
    bwd_kernel(const __grid_constant__ BwdParams p, const __grid_constant__ Cut cut,
               const __grid_constant__ BwdWorkspace w) {
  using R = typename C::R;
  using L = typename C::L;
  constexpr int kSharing = C::kTile.sharing, kLoaders = kSharing > 1 ? 2 : 1;  // of the warps that share channels
  const int64_t slices = ceil_div(p.states, L::kSlice);
  const bool waits = slices > 1;
  const BlockPlace block(p, cut);
  const int group = threadIdx.x / kWarpSize / kSharing, share = threadIdx.x / kWarpSize % kSharing;
  const WarpPlace warp(block, group);
  const int first_tile = share < kLoaders ? share * kDataTiles / kLoaders : kDataTiles;  // of those that it moves
  const int last_tile = min(first_tile + kDataTiles / kLoaders, int{kDataTiles});
  auto& shared = waits ? static_cast<Shared<C>&>(shared_memory<SlicedShared<C>>()) : shared_memory<Shared<C>>();
  const Rows<R> rows(p, w);
  const int64_t segment = block.b * cut.segments + block.segment;
  Scan<C> scan(p, shared, waits ? &shared_memory<SlicedShared<C>>().waiting[group] : nullptr);
  auto& tile = scan.tile;
  if (p.D && scan.own_channel < warp.count) scan.D = load<R>(p.D, warp.channel + scan.own_channel);

  clear_sums(scan, rows, cut, warp, slices, segment);
  bool starts = true;  // until A and the carry that enters the segment are in registers

  for (int64_t at = block.last_tile - 1; at >= block.first_tile; --at) {
    const TimeTile time(p.sequences, at);
    const Marks marks(p.sequences, block.b, time);
    // A piece: tokens of the tile that belong to one sequence, or padding.
    for (int end = time.count, begin; end > 0; end = begin) {
      begin = marks.piece_begin(end - 1);
      const bool padding = marks.padding >> begin & 1u, begins = marks.begins >> begin & 1u,
                 ends = marks.ends >> (end - 1) & 1u;
      const int64_t initial = begins ? marks.initial_row(p.sequences, block.b, time, begin) : -1;
      const int64_t final = ends ? marks.final_row(p.sequences, block.b, time, end - 1) : -1;
      TimeTile piece = time, loaded = time;  // of padding nothing is loaded
      piece.first = loaded.first = begin, piece.count = end, loaded.count = padding ? begin : end;
#pragma unroll 1
      for (int i = first_tile; i < last_tile; ++i) {
        const Data& x = i == kDelta ? p.delta : i == kU ? p.u : i == kDout ? p.dy : p.z;
        if (x) load_tile(tile[i], x, warp, loaded);
      }
      __syncwarp();
      if (share == 0) apply_softplus(tile[kDelta], p, warp, loaded);
      if (share == kLoaders - 1 && p.z) apply_gate(tile[kDout], tile[kDz]);

      for (int64_t slice = 0; slice < slices; ++slice) {
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
          const Projection& x = i == 0 ? p.B : p.C;
          if (C::kPlain || !x.constant())
            shared.projection[i].load_from(x, p, block.b, block.channel, slice, loaded);
          else
            load_constant(shared.projection[i], x, p, block, slice);
        }
        __syncthreads();

        scan.begin = begin, scan.end = end, scan.first_slice = slice == 0, scan.last_slice = slice + 1 == slices;
        if (padding || warp.count == 0) {
          scan.clear_sums();
        } else {
          if (starts || waits) scan.lane.load_A(scan.A, p, warp, slice);
          if (ends)
            scan.lane.load_row(scan.carry, p, warp, slice, {p.dlast_state.data, kDType<R>}, p.dlast_state ? final : -1);
          else if (waits || (starts && cut.segments > 1))
            scan.lane.load_state(scan.carry, p, cut, warp, slice, rows.carry, segment);
          starts = false;
          if (begins)
            scan.lane.load_row(scan.h, p, warp, slice, p.initial_state, p.initial_state ? initial : -1);
          else
            scan.lane.load_state(scan.h, p, cut, warp, slice, p.checkpoints, block.b * num_chunks(p.sequences) + at);

          const int first = begin / C::kWindow, last = (end - 1) / C::kWindow;
#pragma unroll 1
          for (int window = first; window <= last; ++window) {
            scan.keep(window);
            if (window < last) scan.advance(window);
          }
#pragma unroll 1
          for (int window = last; window >= first; --window) scan.walk_back(window);

          if (begins && initial >= 0 && p.dinitial_state)
            scan.lane.store_row(scan.carry, p, warp, slice, p.dinitial_state, initial);
          add_sums(scan, rows, cut, warp, slice, segment);
          if (waits) scan.lane.store_state(scan.carry, p, cut, warp, slice, rows.carry, segment);
        }
        __syncthreads();
        store_channel_sums(shared, p, w, cut, block, slice, piece);
      }

#pragma unroll 1
      for (int i = first_tile; i < last_tile; ++i) {
        const Data& x = i == kDelta ? p.ddelta : i == kU ? p.du : p.dz;
        if (i != kDout && x) store_tile(tile[i], x, warp, piece);
      }
      __syncwarp();
    }
  }
}

using Kernel = void (*)(BwdParams, Cut, BwdWorkspace);

struct Instance {
  Kind kind;
  Kernel kernel;
};

template <typename S, int kStateLanes, bool kPlain>
constexpr Instance instance(Kind kind) {
  using C = Config<S, kStateLanes, kPlain>;
  static_assert(sizeof(Shared<C>) == bwd_smem_bytes(C::kTile, kDType<typename C::R>, kStateLanes, false));
  static_assert(sizeof(SlicedShared<C>) == bwd_smem_bytes(C::kTile, kDType<typename C::R>, kStateLanes, true));
  return {kind, bwd_kernel<C>};
}

constexpr Instance kInstances[] = {
    instance<float, 1, true>(Kind::kSlice4),
    instance<float, 2, true>(Kind::kSlice8),
    instance<float, 4, true>(Kind::kSlice16),
    instance<float, 4, false>(Kind::kGeneral),
    instance<double, 4, false>(Kind::kDouble),
    instance<Complex<float>, 4, false>(Kind::kComplex),
    instance<Complex<double>, 4, false>(Kind::kComplexDouble),
};
static_assert(std::size(kInstances) == kBwdKernels);

}  // namespace

void bwd(const BwdParams& p, Stream stream) {
  const BwdPlan plan = plan_bwd(p);
  const Instance& instance =
      find_instance(kInstances, "selective_scan_bwd", [&](const Instance& i) { return i.kind == plan.kind; });
  const bool some_are_empty = p.sequences.cu_seqlens || p.sequences.seq_idx || p.sequences.length == 0;
  if (p.dinitial_state && p.dlast_state && some_are_empty) pass_states(p, p.dlast_state, p.dinitial_state, stream);
  if (plan.cut.segments > 1) bwd_carry(p, plan, stream);
  launch({.name = "selective_scan_bwd",
          .grid = {plan.blocks},
          .threads = plan.cut.warps * plan.tile.sharing * kWarpSize,
          .smem_bytes = plan.smem_bytes,
          .stream = stream},
         instance.kernel, p, plan.cut, plan.workspace);
  bwd_reduce(p, plan, stream);
}

}  // namespace seqkern::selective_scan::cuda

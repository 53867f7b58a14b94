// After the scan of the backward: sums over the warps of a head for ds, and over its lanes for the gradient of the
// initial state. Every sum has a fixed order.
#include "common/launch.h"
#include "common/reduce.cuh"
#include "softmax_scan/bwd.cuh"

namespace seqkern::softmax_scan::cuda {
namespace {

// ds_t as the sum of what the warps of its head have put into the workspace [ds]
// thread   one score
// bytes    the sums read, ds written
// limits   B L H / kSmallThreads < 2^31 blocks
template <typename R>
__global__ void __launch_bounds__(kSmallThreads, 4)
    sum_scores(const __grid_constant__ BwdParams p, const __grid_constant__ BwdPlan plan) {
  const int64_t at = global_thread(), warps = plan.warps;
  const auto [bt, h] = divide(at, p.heads);
  const auto [b, t] = divide(bt, p.sequences.length);
  if (b >= p.sequences.batch) return;
  const R* from =
      reinterpret_cast<const R*>(static_cast<const unsigned char*>(p.workspace) + plan.sums_at) + at * warps;
  R sum = load(from);
  for (int64_t warp = 1; warp < warps; ++warp) sum += load(from + warp);
  store(Array{p.ds.data, p.ds.dtype}, b * p.ds.b + t * p.ds.l + h * p.ds.h, sum);
}

// dm and dn of the initial state, summed over lanes; and dm, dn, dw of sequences without tokens, which pass them on
// warp     one head of one row of the states
// lane     every 32nd value
// bytes    what lanes have put into the workspace read, the gradients written
// limits   rows H / 8 < 2^31 blocks
template <typename R>
__global__ void __launch_bounds__(kSmallThreads, 4)
    sum_states(const __grid_constant__ BwdParams p, const __grid_constant__ BwdPlan plan) {
  const auto [row, h] = divide(global_thread() / kWarpSize, p.heads);
  if (row >= p.sequences.count) return;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t head = row * p.heads + h;
  const Span span = span_of_state(p.sequences, row, true, 0);
  R dm = R(0), dn = R(0);
  if (span.begin < span.end) {
    // A row that bad cu_seqlens leave to no token.
    if (p.sequences.cu_seqlens && packed_span_at(p.sequences, span.begin).state != row) return;
    const R* from = reinterpret_cast<const R*>(static_cast<const unsigned char*>(p.workspace) + plan.states_at);
    for (int64_t i = lane; i < plan.lanes; i += kWarpSize) {
      const auto part = load<2>(from + 2 * (head * plan.lanes + i));
      dm += part[0], dn += part[1];
    }
    dm = warp_sum(dm), dn = warp_sum(dn);
  } else if (p.dfinal_state) {
    dm = load<R>(p.dfinal_state.m, head);
    const bool empty = load<R>(p.initial_state.m, head) == -kInfinity<R>;
    if (!empty) dn = load<R>(p.dfinal_state.n, head);
    for (int64_t i = head * p.size + lane; i < (head + 1) * p.size && !empty; i += kWarpSize) {
      store(p.dinitial_state.w, i, load<R>(p.dfinal_state.w, i));
    }
  }
  if (lane == 0) store(p.dinitial_state.m, head, dm), store(p.dinitial_state.n, head, dn);
}

struct Instance {
  DType accumulator;
  void (*scores)(BwdParams, BwdPlan);
  void (*states)(BwdParams, BwdPlan);
};

constexpr Instance kInstances[] = {{DType::kFloat32, sum_scores<float>, sum_states<float>},
                                   {DType::kFloat64, sum_scores<double>, sum_states<double>}};
static_assert(2 * std::size(kInstances) == kBwdReduceKernels);

}  // namespace

void bwd_reduce(const BwdParams& p, const BwdPlan& plan, Stream stream) {
  const Instance& instance = find_instance(kInstances, "softmax_scan_bwd_reduce",
                                           [&](const Instance& i) { return i.accumulator == p.accumulator; });
  const auto launch_small = [&](const char* name, int64_t threads, auto kernel) {
    launch({.name = name, .grid = {ceil_div(threads, kSmallThreads)}, .threads = kSmallThreads, .stream = stream},
           kernel, p, plan);
  };
  if (plan.warps > 1) launch_small("softmax_scan_bwd_sum_scores", head_tokens(p), instance.scores);
  if (p.dinitial_state)
    launch_small("softmax_scan_bwd_sum_states", p.sequences.count * p.heads * kWarpSize, instance.states);
}

}  // namespace seqkern::softmax_scan::cuda

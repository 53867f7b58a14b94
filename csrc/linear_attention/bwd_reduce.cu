// After the walk of the backward: sums over what blocks share, each in a fixed order.
#include "common/launch.h"
#include "linear_attention/bwd.cuh"

namespace seqkern::linear_attention::cuda {
namespace {

constexpr int kWarps = kBwdReduceThreads / kWarpSize;

// A contiguous tensor of any dtype (rows, inner), each number the sum of those at `from` in the workspace, which are
// accumulators (parts, rows, group, stride), of which the first `inner` count.
struct Sum {
  Array to;
  int64_t from;  // in bytes
  int64_t rows, inner, stride, group, parts;
  bool deep;            // many parts: the warps of a block share 32 numbers
  int64_t first_block;  // of those that compute it
};
struct Sums {
  static constexpr int kMost = 10;
  Sum sum[kMost];
  int count = 0;
  int64_t blocks = 0;

  void add(Array to, int64_t from, int64_t rows, int64_t inner, int64_t stride, int64_t group, int64_t parts) {
    if (!to || rows * inner == 0) return;
    const bool deep = parts > 4 * kWarps;
    sum[count++] = {to, from, rows, inner, stride, group, parts, deep, blocks};
    blocks += ceil_div(rows * inner, deep ? kWarpSize : kBwdReduceThreads);
  }
};

template <typename R>
struct Shared {
  R sums[kWarps][kWarpSize];
};

// [dq] [dk] [ddecay] [dgates], and gradients of parameters and of normalizers' initial states
// block    one stretch of one of the tensors
// thread   one number; where there are many parts, every kWarps-th part of one
// shared   one sum per thread
// bytes    the parts read, the gradients written
// limits   each tensor's numbers / 32 < 2^31 blocks
template <typename R>
__global__ void __launch_bounds__(kBwdReduceThreads, 4)
    sum_parts(const __grid_constant__ Sums all, const void* workspace) {
  auto& shared = shared_memory<Shared<R>>();
  int which = 0;
  while (which + 1 < all.count && all.sum[which + 1].first_block <= blockIdx.x) ++which;
  const Sum& s = all.sum[which];
  const int64_t block = blockIdx.x - s.first_block;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t at = s.deep ? block * kWarpSize + lane : block * kBwdReduceThreads + threadIdx.x;
  const bool exists = at < s.rows * s.inner;
  const int64_t step = s.deep ? kWarps : 1;
  R total = R(0);
  if (exists) {
    const auto [row, i] = divide(at, s.inner);
    const R* from = reinterpret_cast<const R*>(static_cast<const unsigned char*>(workspace) + s.from) +
                    row * s.group * s.stride + i;
    const int64_t part = s.rows * s.group * s.stride;
    for (int64_t n = s.deep ? warp : 0; n < s.parts; n += step) {
#pragma unroll 4
      for (int64_t member = 0; member < s.group; ++member) total += load(from + n * part + member * s.stride);
    }
  }
  if (s.deep) {
    shared.sums[warp][lane] = total;
    __syncthreads();
    if (warp > 0) return;
    for (int other = 1; other < kWarps; ++other) total += shared.sums[other][lane];
  }
  if (exists) store(s.to, at, total);
}

struct Instance {
  DType accumulator;
  void (*kernel)(Sums, const void*);
  int64_t smem_bytes;
};

constexpr Instance kInstances[] = {{DType::kFloat32, sum_parts<float>, sizeof(Shared<float>)},
                                   {DType::kFloat64, sum_parts<double>, sizeof(Shared<double>)}};
static_assert(std::size(kInstances) == kBwdReduceKernels);

// Everything that several blocks have a part of.
Sums sums_of(const BwdParams& p, const BwdPlan& plan) {
  const BwdWorkspace& w = plan.workspace;
  const int64_t tokens = p.sequences.batch * p.sequences.length, group = p.heads > 0 ? p.value_heads / p.heads : 1;
  const int64_t walks = plan.rows * plan.segments * plan.tiles, HV = p.value_heads;
  const auto whole = [](const Data& data) { return Array{data.data, data.dtype}; };
  Sums sums;
  if (plan.share_keys) {
    sums.add(whole(p.dq), w.dq, tokens * p.heads, p.keys, plan.tile.keys, group, plan.tiles);
    sums.add(whole(p.dk), w.dk, tokens * p.heads, p.keys, plan.tile.keys, group, plan.tiles);
  }
  if (is_constant(p)) {
    sums.add(whole(p.ddecay), w.ddecay, 1, HV, HV, 1, walks);
  } else if (plan.tiles > 1) {
    const int64_t inner = p.gates.form == Form::kKey ? p.keys : 1;
    sums.add(whole(p.ddecay), w.ddecay, tokens * HV, inner, inner, 1, plan.tiles);
    sums.add(whole(p.dinput), w.dinput, tokens * HV, 1, 1, 1, plan.tiles);
  }
  if (plan.tiles > 1) {
    sums.add(p.dinitial_state.z, w.dz, p.sequences.count * HV, p.keys, p.keys, 1, plan.tiles);
    sums.add(p.dinitial_state.m, w.dm, p.sequences.count * HV, 1, 1, 1, plan.tiles);
  }
  sums.add(p.dA, w.dA, HV, 1, 1, 1, walks);
  sums.add(p.dbias, w.dbias, HV, 1, 1, 1, walks);
  sums.add(p.dbonus, w.dbonus, p.heads, p.keys, p.keys, group, walks);
  if (p.skip_v == 0)
    sums.add(p.dskip, w.dskip, HV, 1, 1, 1, walks);
  else
    sums.add(p.dskip, w.dskip, HV, p.size, p.size, 1, plan.rows * plan.segments);
  return sums;
}

}  // namespace

void bwd_reduce(const BwdParams& p, const BwdPlan& plan, Stream stream) {
  const Sums sums = sums_of(p, plan);
  const Instance& instance = find_instance(kInstances, "linear_attention_bwd_reduce",
                                           [&](const Instance& i) { return i.accumulator == p.accumulator; });
  launch({.name = "linear_attention_bwd_reduce",
          .grid = {sums.blocks},
          .threads = kBwdReduceThreads,
          .smem_bytes = instance.smem_bytes,
          .stream = stream},
         instance.kernel, sums, static_cast<const void*>(p.workspace));
}

}  // namespace seqkern::linear_attention::cuda

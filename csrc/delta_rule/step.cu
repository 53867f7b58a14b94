// One token, for inference. One launch; the state is updated in place.
#include <string>

#include "common/grid.cuh"
#include "common/launch.h"
#include "common/reduce.cuh"
#include "common/sequences.cuh"
#include "common/state_step.cuh"
#include "delta_rule/params.h"
#include "delta_rule/tile_step.h"

namespace seqkern::delta_rule::cuda {
namespace {

template <typename R>
struct Shared {
  R erase[kMaxKeys], read[kMaxKeys];   // of each key: what it adds to S'^T e and S'^T q,
  R write[kMaxKeys], decay[kMaxKeys];  // to S, and what is kept
  R qq[kStepThreads / 32], kk[kStepThreads / 32], qk[kStepThreads / 32];  // products of q and k: sums of warps
  R erased[kStepThreads * kStepValues], out[kStepThreads * kStepValues];  // (parts, width): S'^T e, S'^T q
};

// The keys of the token, not normalized yet; past the last key zeros.
template <typename R>
__device__ __forceinline__ void take_keys(const StepParams& p, Shared<R>& shared, int64_t b, int64_t h) {
  const int64_t key_head = divide(h, divide(p.value_heads, p.heads).quotient).quotient;
  R qq = R(0), kk = R(0), qk = R(0);
  for (int i = static_cast<int>(threadIdx.x); i < kMaxKeys; i += static_cast<int>(blockDim.x)) {
    const bool exists = i < p.keys;
    const R q = exists ? number<R>(p.q, b, key_head, i) : R(0), k = exists ? number<R>(p.k, b, key_head, i) : R(0);
    const R e = p.erase && exists ? number<R>(p.erase, b, key_head, i) : k;
    R decay = R(1);  // [decay]
    if (p.form != Decay::kNone && exists) decay = exp(number<R>(p.decay, b, h, p.form == Decay::kKey ? i : 0));
    qq = fma(q, q, qq), kk = fma(k, k, kk), qk = fma(q, k, qk);
    shared.erase[i] = decay * e, shared.read[i] = decay * q, shared.write[i] = k, shared.decay[i] = decay;
  }
  qq = warp_sum(qq), kk = warp_sum(kk), qk = warp_sum(qk);
  if (threadIdx.x % kWarpSize == 0) {
    const unsigned warp = threadIdx.x / kWarpSize;
    shared.qq[warp] = qq, shared.kk[warp] = kk, shared.qk[warp] = qk;
  }
}

// S with the token, and o. Both products with the state before it are taken at once: S^T q = S'^T q + (k . q) u.
// block    `width` neighbouring values of a head, all keys
// thread   part p, lane l: keys p, p + parts ... of its values l, in registers from load to store
// shared   of each key what is to be done with it; sums over keys, one for each part
// bytes    state read and written once, the rest once for each block
// limits   K <= kMaxKeys; blocks of all heads < 2^31; batch rows that share a state row are undefined
template <typename R, bool kValueMajor>
__global__ void __launch_bounds__(kStepThreads, step_blocks_per_sm(kDType<R>))
    step_kernel(const __grid_constant__ StepParams p, const __grid_constant__ StepPlan plan) {
  using State = HeadState<R, kValueMajor>;
  constexpr int kKeys = State::kKeys, kValues = State::kValues, kBlocks = kMaxKeys / (kStateParts * kKeys);
  auto& shared = shared_memory<Shared<R>>();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int parts = plan.cut.parts, lanes = threads / parts, width = plan.cut.width;
  const int part = kValueMajor ? thread % parts : thread / lanes, lane = kValueMajor ? thread / parts : thread % lanes;
  const auto [head, tile] = divide(blockIdx.x, plan.tiles);
  const auto [b, h] = divide(head, p.value_heads);
  const int keys = static_cast<int>(p.keys), size = static_cast<int>(p.size), begin = static_cast<int>(tile) * width;
  const int64_t row = state_row(p, b), of_o = b * p.o.b + h * p.o.h;
  const Array o{p.o.data, p.o.dtype};
  if (row < 0) {
    for (int v = begin + thread; v < min(begin + width, size); v += threads) store(o, of_o + v * p.o.i, R(0));
    return;
  }

  const State S{{p.S.data, p.S.dtype}, row * p.S.b + h * p.S.h, p.S.i, p.S_v, keys, size};
  typename State::Block s[kBlocks];
  const auto key = [&](int n) { return (part + n * parts) * kKeys; };
  const int v = begin + lane * kValues;
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    if (key(n) < keys) S.load_block(s[n], key(n), v);
  }
  take_keys(p, shared, b, h);
  __syncthreads();

  R erased[kValues] = {}, out[kValues] = {};
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    if (key(n) >= keys) continue;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const R erase = shared.erase[key(n) + i], read = shared.read[key(n) + i];
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        erased[j] = fma(erase, State::element(s[n], i, j), erased[j]);
        out[j] = fma(read, State::element(s[n], i, j), out[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    const int place = place_of_partial(part, lane * kValues + j, width);
    shared.erased[place] = erased[j], shared.out[place] = out[j];
  }
  __syncthreads();

  for (int j = thread; j < width && begin + j < size; j += threads) {
    R of_q = R(1), of_k = R(1), old = R(0), read = R(0);
    if (p.normalize) {  // [norm]
      of_q = R(1) / sqrt(sum_of_warps(shared.qq) + static_cast<R>(kNormEps));
      of_k = R(1) / sqrt(sum_of_warps(shared.kk) + static_cast<R>(kNormEps));
    }
    for (int other = 0; other < parts; ++other) {
      const int place = place_of_partial(other, j, width);
      old += shared.erased[place], read += shared.out[place];
    }
    if (!p.erase) old *= of_k;
    const R u = number<R>(p.beta, b, h) * (number<R>(p.v, b, h, begin + j) - old);  // [erase]
    const R result = of_q * fma(of_k * sum_of_warps(shared.qk), u, read);           // [read]
    store(o, of_o + (begin + j) * p.o.i, static_cast<R>(p.scale) * result);
    shared.erased[place_of_partial(0, j, width)] = of_k * u;  // for all parts
  }
  __syncthreads();

#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    if (key(n) >= keys) continue;
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      const R u = shared.erased[place_of_partial(0, lane * kValues + j, width)];
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        R& x = State::element(s[n], i, j);
        x = fma(shared.decay[key(n) + i], x, shared.write[key(n) + i] * u);  // [write]
      }
    }
    S.store_block(s[n], key(n), v);
  }
}

struct Instance {
  DType accumulator;
  bool value_major;
  void (*kernel)(StepParams, StepPlan);
};

constexpr Instance kInstances[] = {
    {DType::kFloat32, false, step_kernel<float, false>},
    {DType::kFloat32, true, step_kernel<float, true>},
    {DType::kFloat64, false, step_kernel<double, false>},
    {DType::kFloat64, true, step_kernel<double, true>},
};
static_assert(std::size(kInstances) == kStepKernels);

}  // namespace

void step(const StepParams& p, Stream stream) {
  if (p.keys > kMaxKeys) {
    throw std::runtime_error("seqkern: delta_rule_step: K must be at most " + std::to_string(kMaxKeys) +
                             " on CUDA, got " + std::to_string(p.keys));
  }
  const StepPlan plan = plan_step(p);
  const Instance& instance = find_instance(kInstances, "delta_rule_step", [&](const Instance& i) {
    return i.accumulator == p.accumulator && i.value_major == plan.cut.value_major;
  });
  launch({.name = "delta_rule_step",
          .grid = {plan.blocks},
          .threads = plan.cut.threads,
          .smem_bytes = plan.smem_bytes,
          .stream = stream},
         instance.kernel, p, plan);
}

}  // namespace seqkern::delta_rule::cuda

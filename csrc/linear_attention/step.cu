// One token, for inference. One launch; the state is updated in place.
#include <string>

#include "common/grid.cuh"
#include "common/launch.h"
#include "common/math.cuh"
#include "common/reduce.cuh"
#include "common/sequences.cuh"
#include "common/state_step.cuh"
#include "linear_attention/params.h"
#include "linear_attention/tile_step.h"

namespace seqkern::linear_attention::cuda {
namespace {

template <typename R>
constexpr StepTile kTile = pick_step_tile(kDType<R>);

// What the token does to a head, without a decay per key [gate]
template <typename R>
struct Gate {
  R decay = R(1), weight = R(1);
  R m = R(0);          // as the state keeps it: any m near the maximum gives the same o
  bool empty = false;  // whatever S and z hold counts as zero
};

template <typename R>
__device__ __forceinline__ Gate<R> gate_of(const StepParams& p, int64_t b, int64_t row, int64_t h) {
  Gate<R> gate;
  if (p.form == Form::kToken) {
    gate.decay = exp(number<R>(p.decay, b, h));
  } else if (p.form == Form::kDelta) {
    R delta = number<R>(p.decay, b, h);
    if (p.bias) delta += load<R>(p.bias, h);
    if (p.softplus) delta = softplus(delta);
    const R low = static_cast<R>(p.low), high = static_cast<R>(p.high);
    gate.weight = delta < low ? low : delta > high ? high : delta;
    gate.decay = exp(gate.weight * load<R>(p.A, h));
  } else if (p.form == Form::kExp) {
    const R before = number<R>(p.m, row, h), kept = before - softplus(-number<R>(p.decay, b, h));
    const R input = number<R>(p.input, b, h);
    gate.m = input > kept ? input : kept;
    visit(Array{p.m.data, p.m.dtype}, [&]<typename T>(T*) { gate.m = to<R>(to<T>(gate.m)); });
    gate.empty = before == R(-INFINITY);
    const bool leaves_empty = gate.m == R(-INFINITY);
    gate.decay = gate.empty || leaves_empty ? R(0) : exp(kept - gate.m);
    gate.weight = leaves_empty ? R(0) : exp(input - gate.m);
  }
  return gate;
}

// d [norm] of e = z . q as read
template <typename R>
__device__ __forceinline__ R denominator(const StepParams& p, R e, R m) {
  const R eps = static_cast<R>(p.eps);
  if (p.normalizer == Normalizer::kSum) return e + eps;
  const R size = fabs(static_cast<R>(p.scale) * e), least = exp(-m);
  return (size < least ? least : size) + eps;
}

template <typename R>
struct Shared {
  R read[kMaxKeys], write[kMaxKeys], decay[kMaxKeys];  // of each key: what it adds to n, to S, what is kept
  R token[kTile<R>.threads / kWarpSize], z[kTile<R>.threads / kWarpSize];  // sums of warps
  R n[kTile<R>.threads * kStepValues];                                     // (parts, width)
};

// The keys of the token: n = sum of read S + token v, S = decay S + write v, and z likewise with 1 for v.
template <typename R>
__device__ __forceinline__ void take_keys(const StepParams& p, Shared<R>& shared, const Gate<R>& gate, int64_t b,
                                          int64_t row, int64_t h) {
  const int64_t key_head = divide(h, divide(p.value_heads, p.heads).quotient).quotient;
  R token = R(0), of_z = R(0);
  for (int64_t i = threadIdx.x; i < p.keys; i += blockDim.x) {
    const R q = number<R>(p.q, b, key_head, i), k = number<R>(p.k, b, key_head, i), write = gate.weight * k;
    const R decay = p.form == Form::kKey ? exp(number<R>(p.decay, b, h, i)) : gate.decay;
    const R read = p.read_previous ? q : decay * q;
    if (!p.read_previous)
      token = fma(q, write, token);
    else if (p.bonus)
      token = fma(q, load<R>(p.bonus, key_head * p.keys + i) * k, token);
    shared.read[i] = read, shared.write[i] = write, shared.decay[i] = decay;
    if (p.normalizer != Normalizer::kNone) {
      const R before = gate.empty ? R(0) : number<R>(p.z, row, h, i);
      of_z = fma(read, before, of_z);
      store(Array{p.z.data, p.z.dtype}, row * p.z.b + h * p.z.h + i * p.z.i, fma(decay, before, write));  // [sum]
    }
  }
  token = warp_sum(token), of_z = warp_sum(of_z);
  if (threadIdx.x % kWarpSize == 0) {
    shared.token[threadIdx.x / kWarpSize] = token, shared.z[threadIdx.x / kWarpSize] = of_z;
  }
}

// S, z and m with the token [state] [sum]; y from S and z before or after it [read] [norm] [out] [skip]
// block    `width` neighbouring values of a head, all keys; all values in turn where the head has a normalizer
// thread   part p, lane l: 16 bytes of accumulators in 4 rows of S, keys p, p + parts ... of its values l
// shared   of each key what is to be done with it; sums over keys, one for each part
// bytes    state read and written, the rest once for each head, q and k for each block
// limits   K <= kMaxKeys; blocks of all heads < 2^31; batch rows that share a state row are undefined
template <typename R, bool kValueMajor>
__global__ void __launch_bounds__(kTile<R>.threads, kTile<R>.blocks_per_sm)
    step_kernel(const __grid_constant__ StepParams p, const __grid_constant__ StepPlan plan) {
  using State = HeadState<R, kValueMajor>;
  constexpr int kKeys = State::kKeys, kValues = State::kValues;
  auto& shared = shared_memory<Shared<R>>();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int parts = plan.cut.parts, lanes = threads / parts, width = plan.cut.width;
  const int part = kValueMajor ? thread % parts : thread / lanes, lane = kValueMajor ? thread / parts : thread % lanes;
  const int first_key = part * kKeys;
  const int keys = static_cast<int>(p.keys), size = static_cast<int>(p.size);
  const auto [head, tile] = divide(blockIdx.x, plan.tiles);
  const auto [b, h] = divide(head, p.value_heads);
  const int64_t row = state_row(p, b);
  const int first = static_cast<int>(tile) * width, to_next = plan.tiles * width;
  const Array y{p.y.data, p.y.dtype};
  const int64_t of_y = b * p.y.b + h * p.y.h;
  if (row < 0) {
    const int end = p.normalizer == Normalizer::kNone ? min(first + width, size) : size;
    for (int v = first + thread; v < end; v += threads) store(y, of_y + v * p.y.i, R(0));
    return;
  }

  const StepParams::Rows& rows = p.S.rows;
  const State S{{rows.data, rows.dtype}, row * rows.b + h * rows.h, rows.i, p.S.v, keys, size};
  typename State::Block s;
  S.load_block(s, first_key, first + lane * kValues);  // on its way while the gates are computed

  const Gate<R> gate = gate_of<R>(p, b, row, h);
  take_keys(p, shared, gate, b, row, h);
  __syncthreads();
  if (p.form == Form::kExp && thread == 0) store(Array{p.m.data, p.m.dtype}, row * p.m.b + h * p.m.h, gate.m);

  for (int begin = first; begin < size; begin += to_next) {
    const int v = begin + lane * kValues;
    R values[kValues], n[kValues] = {};
#pragma unroll
    for (int j = 0; j < kValues; ++j) values[j] = v + j < size ? number<R>(p.v, b, h, v + j) : R(0);
    for (int k = first_key; k - first_key < keys; k += parts * kKeys) {
      if (begin != first || k != first_key) S.load_block(s, k, v);
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        if (k + i >= keys) continue;
        const R read = shared.read[k + i], write = shared.write[k + i], decay = shared.decay[k + i];
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
          R& element = State::element(s, i, j);
          const R before = gate.empty ? R(0) : element;
          n[j] = fma(read, before, n[j]);
          element = fma(decay, before, write * values[j]);
        }
      }
      S.store_block(s, k, v);
    }

#pragma unroll
    for (int j = 0; j < kValues; ++j) shared.n[place_of_partial(part, lane * kValues + j, width)] = n[j];
    __syncthreads();
    for (int j = thread; j < width && begin + j < size; j += threads) {
      const int i = begin + j;
      const R value = number<R>(p.v, b, h, i), token = sum_of_warps(shared.token);
      R o = token * value;
      for (int other = 0; other < parts; ++other) o += shared.n[place_of_partial(other, j, width)];
      if (p.normalizer != Normalizer::kSum) o *= static_cast<R>(p.scale);
      if (p.normalizer != Normalizer::kNone) o /= denominator(p, sum_of_warps(shared.z) + token, gate.m);
      if (p.skip) o = fma(load<R>(p.skip, h * p.skip_h + i * p.skip_v), value, o);
      if (p.gate) o *= silu<R>(number<R>(p.gate, b, h, i));
      store(y, of_y + i * p.y.i, o);
    }
    __syncthreads();
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
    throw std::runtime_error("seqkern: linear_attention_step: K must be at most " + std::to_string(kMaxKeys) +
                             " on CUDA, got " + std::to_string(p.keys));
  }
  const StepPlan plan = plan_step(p);
  const Instance& instance = find_instance(kInstances, "linear_attention_step", [&](const Instance& i) {
    return i.accumulator == p.accumulator && i.value_major == plan.cut.value_major;
  });
  launch({.name = "linear_attention_step",
          .grid = {plan.blocks},
          .threads = plan.cut.threads,
          .smem_bytes = plan.smem_bytes,
          .stream = stream},
         instance.kernel, p, plan);
}

}  // namespace seqkern::linear_attention::cuda

// One token, for inference. One launch; the state is updated in place.
#include "common/array.cuh"
#include "common/complex.cuh"
#include "common/grid.cuh"
#include "common/launch.h"
#include "common/math.cuh"
#include "common/sequences.cuh"
#include "selective_scan/params.h"
#include "selective_scan/tile.h"

namespace seqkern::selective_scan::cuda {
namespace {

template <typename R>
constexpr StepTile kTile = pick_step_tile(kDType<R>);

using PerChannel = StepParams::PerChannel;
using PerState = StepParams::PerState;

template <typename R>
__device__ __forceinline__ R value(const PerChannel& x, int64_t b, int64_t h, int64_t p) {
  return load<R>(Array{x.data, x.dtype}, b * x.b + h * x.h + p * x.p);
}

// f(reals from there on, whether they are contiguous and aligned, from one state to the next): the kCount states that
// begin at element `first` of a tensor, which are states n ... of N.
template <typename S, int kCount, typename F>
__device__ __forceinline__ void visit_states(const PerState& x, int64_t first, int64_t n, F&& f) {
  constexpr int kParts = sizeof(S) / sizeof(Real<S>);
  visit(Array{x.data, x.dtype}, [&]<typename T>(T* data) {
    T* from = data + first + n * x.n;
    const bool whole = x.n == kParts && reinterpret_cast<uintptr_t>(from) % alignof(Vector<T, kCount * kParts>) == 0;
    f(from, whole);
  });
}

// kCount states from state n on, those that exist; else zero.
template <typename S, int kCount>
__device__ __forceinline__ void load_states(S (&values)[kCount], const PerState& x, int64_t first, int64_t n,
                                            int64_t states) {
  using R = Real<S>;
  constexpr int kParts = sizeof(S) / sizeof(R);
  R* reals = reinterpret_cast<R*>(values);
  visit_states<S, kCount>(x, first, n, [&]<typename T>(const T* from, bool whole) {
    if (whole && n + kCount <= states) {
      const auto v = load<kCount * kParts>(from);
#pragma unroll
      for (int i = 0; i < kCount * kParts; ++i) reals[i] = to<R>(v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount * kParts; ++i) {
        reals[i] = n + i / kParts < states ? to<R>(load(from + i / kParts * x.n + i % kParts)) : R(0);
      }
    }
  });
}

template <typename S, int kCount>
__device__ __forceinline__ void store_states(const S (&values)[kCount], const PerState& x, int64_t first, int64_t n,
                                             int64_t states) {
  using R = Real<S>;
  constexpr int kParts = sizeof(S) / sizeof(R);
  const R* reals = reinterpret_cast<const R*>(values);
  visit_states<S, kCount>(x, first, n, [&]<typename T>(T* out, bool whole) {
    if (whole && n + kCount <= states) {
      Vector<T, kCount * kParts> v;
#pragma unroll
      for (int i = 0; i < kCount * kParts; ++i) v[i] = to<T>(reals[i]);
      store(out, v);
    } else {
#pragma unroll
      for (int i = 0; i < kCount * kParts; ++i) {
        if (n + i / kParts < states) store(out + i / kParts * x.n + i % kParts, to<T>(reals[i]));
      }
    }
  });
}

// h = a h + delta' u B [state], a of [decay], delta' of [delta]; y = (sum_n C h + D u) silu(z) [out]
// block    `threads / lanes` neighbouring channels (b, h, p)
// thread   of the `lanes` of a channel: 16 bytes of accumulators of its states, then those `lanes` vectors further on
// shared   none
// bytes    state read and written, the rest once for each channel; A, B, C through the caches
// limits   B H P lanes / threads < 2^31 blocks; batch rows that share a state row are undefined
template <typename R, bool kComplex>
__global__ void __launch_bounds__(kTile<R>.threads, kTile<R>.blocks_per_sm)
    step_kernel(const __grid_constant__ StepParams p, const int lanes) {
  using S = std::conditional_t<kComplex, Complex<R>, R>;
  constexpr int kStates = 16 / sizeof(S);
  const auto [channel, lane] = divide(global_thread(), lanes);
  const auto [bh, i] = divide(channel, p.size);
  const auto [b, h] = divide(bh, p.heads);
  const bool exists = b < p.batch;
  const int64_t row = exists ? state_row(p, b) : -1;
  const bool runs = row >= 0;

  R out = R(0), u = R(0);
  if (runs) {
    u = value<R>(p.u, b, h, i);
    R delta = value<R>(p.delta, b, h, i);
    if (p.delta_bias) delta += value<R>(p.delta_bias, 0, h, i);
    if (p.softplus) delta = softplus(delta);
    const auto first = [&](const PerState& x, int64_t batch_row) {
      return batch_row * x.b + divide(h, x.heads_per_group).quotient * x.h + i * x.p;
    };
    const int64_t of_state = first(p.state, row), of_A = first(p.A, 0), of_B = first(p.B, b), of_C = first(p.C, b);
    for (int64_t n = lane * kStates; n < p.states; n += lanes * kStates) {
      S state[kStates], A[kStates], B[kStates], C[kStates];
      load_states(state, p.state, of_state, n, p.states);
      load_states(A, p.A, of_A, n, p.states);
      load_states(B, p.B, of_B, n, p.states);
      load_states(C, p.C, of_C, n, p.states);
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        S a = exp_of(delta, exp_rate(A[k]));
        if (p.two_exp) a = fma(R(2), a, S(R(-1)));
        state[k] = fma(a, state[k], delta * u * B[k]);
        out = fma_real(C[k], state[k], out);
      }
      store_states(state, p.state, of_state, n, p.states);
    }
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2) out += __shfl_xor_sync(0xffffffffu, out, distance);
  if (!exists || lane != 0) return;

  R y = R(0);
  if (runs) {
    y = kComplex ? R(2) * out : out;
    if (p.D) y = fma(value<R>(p.D, 0, h, i), u, y);
    if (p.z) y *= silu<R>(value<R>(p.z, b, h, i));
  }
  store(Array{p.y.data, p.y.dtype}, b * p.y.b + h * p.y.h + i * p.y.p, y);
}

struct Instance {
  DType accumulator;
  bool complex;
  void (*kernel)(StepParams, int);
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
  const StepPlan plan = plan_step(p);
  const Instance& instance = find_instance(kInstances, "selective_scan_step", [&](const Instance& i) {
    return i.accumulator == p.accumulator && i.complex == p.complex;
  });
  launch({.name = "selective_scan_step", .grid = {plan.blocks}, .threads = plan.tile.threads, .stream = stream},
         instance.kernel, p, plan.lanes);
}

}  // namespace seqkern::selective_scan::cuda

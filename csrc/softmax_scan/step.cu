// One token, for inference. One launch; the state is updated in place.
#include "common/launch.h"
#include "softmax_scan/scan.cuh"

namespace seqkern::softmax_scan::cuda {
namespace {

template <typename R>
constexpr StepTile kTile = pick_step_tile(kDType<R>);

using Rows = StepParams::Rows;

// A number of a tensor with strides.
struct Element {
  Array array;
  int64_t at;

  __device__ __forceinline__ Element(const Rows& x, int64_t b, int64_t h, int64_t v = 0)
      : array{x.data, x.dtype}, at(b * x.b + h * x.h + v * x.v) {}
  template <typename R>
  __device__ __forceinline__ R get() const {
    return load<R>(array, at);
  }
  template <typename R>
  __device__ __forceinline__ void put(R value) const {
    store(array, at, value);
  }
};

// exp(m - m as it is kept), which n and w are kept in: a 16-bit dtype rounds m.
template <typename R>
__device__ __forceinline__ R unit_of(const Rows& x, R m) {
  R kept = m;
  visit(Array{x.data, x.dtype}, [&]<typename T>(T*) { kept = to<R>(to<T>(m)); });
  return kept == m ? R(1) : exp(m - kept);
}

// (m, n, w) with the token [max] [sum] [sumv], o = w / n [out]
// block    the heads of batch rows, `lanes` threads each
// thread   of the `lanes` of a head: every `lanes`-th value
// shared   none
// bytes    state read and written, s, v, o once
// limits   B H lanes / threads < 2^31 blocks; batch rows that share a state row are undefined
template <typename R>
__global__ void __launch_bounds__(kTile<R>.threads, kTile<R>.blocks_per_sm)
    step_kernel(const __grid_constant__ StepParams p, const int lanes) {
  const auto [bh, lane] = divide(global_thread(), lanes);
  const auto [b, h] = divide(bh, p.heads);
  const bool exists = b < p.batch;
  const int64_t row = exists ? state_row(p, b) : -1;
  const bool runs = row >= 0;
  Sums<R> before = Sums<R>::empty();
  R s = R(0);
  if (runs) {
    s = Element(p.s, b, h).template get<R>();
    const R m = Element(p.m, row, h).template get<R>();
    if (m != -kInfinity<R>) before.m = m, before.n = Element(p.n, row, h).template get<R>() + (m - m);
  }
  __syncwarp();  // all lanes of the head have read m and n
  if (!exists) return;

  Sums<R> after = merge(token_of(s, R(0)), before);
  const R unit = unit_of(p.m, after.m);
  if (runs && lane == 0) Element(p.m, row, h).put(after.m), Element(p.n, row, h).put(after.n * unit);
  for (int64_t i = lane; i < p.size; i += lanes) {
    const Element w(p.w, row, h, i);
    R o = R(0);
    if (runs) {
      before.w = before.m == -kInfinity<R> ? R(0) : w.template get<R>();
      after = merge(token_of(s, Element(p.v, b, h, i).template get<R>()), before);
      w.put(after.w * unit);
      o = after.n == R(0) ? R(0) : over(after.w, after.n);
    }
    Element(p.o, b, h, i).put(o);
  }
}

struct Instance {
  DType accumulator;
  void (*kernel)(StepParams, int);
};

constexpr Instance kInstances[] = {{DType::kFloat32, step_kernel<float>}, {DType::kFloat64, step_kernel<double>}};
static_assert(std::size(kInstances) == kStepKernels);

}  // namespace

void step(const StepParams& p, Stream stream) {
  const StepPlan plan = plan_step(p);
  const Instance& instance =
      find_instance(kInstances, "softmax_scan_step", [&](const Instance& i) { return i.accumulator == p.accumulator; });
  launch({.name = "softmax_scan_step", .grid = {plan.blocks}, .threads = plan.tile.threads, .stream = stream},
         instance.kernel, p, plan.lanes);
}

}  // namespace seqkern::softmax_scan::cuda

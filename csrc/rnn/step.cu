// One token, for inference: a product and the cell; with proj two of each. The state is updated in place.
#include "common/launch.h"
#include "common/sequences.cuh"
#include "rnn/stepwise.cuh"

namespace seqkern::rnn::cuda {
namespace {

using Rows = StepParams::Rows;

// What the launches hand one another.
struct StepWork {
  Array product;    // (H, B, G P), accumulator dtype
  Array projected;  // (H, B, Q), the same
  Array m;          // (H, B, P), dtype of x
  int64_t bytes = 0;

  explicit StepWork(const StepParams& p) {
    char* const start = static_cast<char*>(p.workspace);
    const auto room = [&](int64_t count, DType dtype) {
      const int64_t first = bytes;
      bytes += round_up(count * size_of(dtype), 16);
      return Array{start ? start + first : nullptr, dtype};
    };
    const int64_t rows = p.batch * p.heads;
    product = room(rows * sizes_of(p.cell).gates * p.units, p.accumulator);
    if (!p.proj) return;
    projected = room(rows * p.outputs, p.accumulator);
    m = room(rows * p.units, p.x.dtype);
  }
};

template <typename R>
__device__ __forceinline__ R value(const Rows& x, int64_t row, const Element& at) {
  return load<R>(Array{x.data, x.dtype}, row * x.b + at.head * x.h + at.i * x.p);
}
template <typename R>
__device__ __forceinline__ void set(const Rows& x, int64_t row, const Element& at, R value) {
  store(Array{x.data, x.dtype}, row * x.b + at.head * x.h + at.i * x.p, value);
}

// What a step is given and leaves is what a cell carries, but for sLSTM: (c, n, m) there is (y, l) here, whatever scale
// m is given in.
template <int kCell, typename R>
__device__ __forceinline__ void take_state(const StepParams& p, int64_t row, const Element& at,
                                           R (&c)[kNumbers<kCell>]) {
  using C = CellOf<kCell, R>;
  if constexpr (C::kCarried == 2) {
    const R sum = value<R>(p.state[1], row, at), n = value<R>(p.state[2], row, at), m = value<R>(p.state[3], row, at);
    C::empty(c);
    const R none = c[1], l = n == R(0) ? none : m + log(n);
    if (l != none) c[0] = sum / n, c[1] = l;
  } else if constexpr (C::kCarried == 1) {
    c[0] = value<R>(p.state[1], row, at);
  }
}
template <int kCell, typename R>
__device__ __forceinline__ void put_state(const StepParams& p, int64_t row, const Element& at,
                                          const R (&c)[kNumbers<kCell>]) {
  using C = CellOf<kCell, R>;
  if constexpr (C::kCarried > 0) set(p.state[1], row, at, c[0]);
  if constexpr (C::kCarried == 2) {
    R none[kNumbers<kCell>];
    C::empty(none);
    set(p.state[2], row, at, c[1] == none[1] ? R(0) : R(1)), set(p.state[3], row, at, c[1]);
  }
}

template <typename R>
__device__ __forceinline__ void leave_h(const StepParams& p, int64_t row, const Element& at, R made) {
  R h = made;
  if (p.zoneout > 0) {  // [zoneout]
    const R kept = static_cast<R>(p.zoneout);
    h = kept * value<R>(p.state[0], row, at) + (1 - kept) * made;
  }
  set(p.state[0], row, at, h), set(p.h, at.b, at, h);
}

// u = product + bias [recur]; m, c = cell(x, u, c) [cell]; without proj h = m
// thread   one unit of one batch row
// bytes    x, product, bias, h or m once; state read and written
// limits   B H P / 128 < 2^31 blocks; batch rows that share a state row are undefined
template <int kCell, typename R>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    step_kernel(const __grid_constant__ StepParams p, const __grid_constant__ Array product,
                const __grid_constant__ Array made) {
  using C = CellOf<kCell, R>;
  const Element at(p.batch, p.heads, p.units);
  if (!at.exists) return;
  const int64_t row = state_row(p, at.b);
  if (row < 0) return p.proj ? put(made, at.of_product(p.batch, p.units), R(0)) : set(p.h, at.b, at, R(0));
  R x[C::kGates], u[C::kGates], c[kNumbers<kCell>] = {};
  take(x, p.x, at.b * p.x.b + at.head * p.x.h + at.i, p.x.g);
#pragma unroll
  for (int g = 0; g < C::kGates; ++g)
    u[g] = load(number<R>(product, at.of_product(p.batch, C::kGates * p.units) + g * p.units));
  add_bias(u, p.bias, at, p.units);
  take_state<kCell>(p, row, at, c);
  const R h = C::kReadsH ? value<R>(p.state[0], row, at) : R(0);
  const R m = with_cell<kCell, R>(p.cell, [&](auto cell) { return decltype(cell)::step(x, u, h, c); });
  put_state<kCell>(p, row, at, c);
  if (p.proj)
    put(made, at.of_product(p.batch, p.units), m);
  else
    leave_h(p, row, at, m);
}

// h = projected [proj]
// thread   one output of one batch row
template <typename R>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    step_project_kernel(const __grid_constant__ StepParams p, const __grid_constant__ Array projected) {
  const Element at(p.batch, p.heads, p.outputs);
  if (!at.exists) return;
  const int64_t row = state_row(p, at.b);
  if (row < 0) return set(p.h, at.b, at, R(0));
  leave_h(p, row, at, load(number<R>(projected, at.of_product(p.batch, p.outputs))));
}

struct Instance {
  DType accumulator;
  void (*step[kCellKernels])(StepParams, Array, Array);
  void (*project)(StepParams, Array);
};
template <typename R>
constexpr Instance kInstance = {
    kDType<R>, {step_kernel<0, R>, step_kernel<1, R>, step_kernel<2, R>, step_kernel<3, R>}, step_project_kernel<R>};

constexpr Instance kInstances[] = {kInstance<float>, kInstance<double>};
static_assert(std::size(kInstances) * (kCellKernels + 1) == kStepKernels);

Launch of_elements(const char* name, const StepParams& p, int64_t size, Stream stream) {
  return {.name = name, .grid = {ceil_div(p.batch * p.heads * size, kThreads)}, .threads = kThreads, .stream = stream};
}

}  // namespace

int64_t step_workspace_bytes(const StepParams& p) {
  return StepWork(p).bytes;
}

void step(const StepParams& p, Stream stream) {
  const StepWork work(p);
  const Instance& instance =
      find_instance(kInstances, "rnn_step", [&](const Instance& i) { return i.accumulator == p.accumulator; });
  const int64_t gates = sizes_of(p.cell).gates * p.units;
  const Rows& h = p.state[0];
  multiply({.heads = p.heads,
            .rows = p.batch,
            .columns = gates,
            .depth = p.outputs,
            .operands = p.x.dtype,
            .left = {h.data, h.dtype, h.b, h.h, h.p},
            .right = {p.R.data, p.R.dtype, p.outputs, gates * p.outputs},
            .right_transposed = true,
            .out = work.product,
            .line_indices = p.state_indices,
            .line_indices_is_int64 = p.state_indices_is_int64,
            .lines = p.rows},
           stream);
  launch(of_elements("rnn_step", p, p.units, stream), instance.step[kernel_of(p.cell)], p, work.product, work.m);
  if (!p.proj) return;
  multiply({.heads = p.heads,
            .rows = p.batch,
            .columns = p.outputs,
            .depth = p.units,
            .operands = p.x.dtype,
            .left = {work.m.data, work.m.dtype, p.units, p.batch * p.units},
            .right = {p.proj.data, p.proj.dtype, p.units, p.outputs * p.units},
            .right_transposed = true,
            .out = work.projected},
           stream);
  launch(of_elements("rnn_step_project", p, p.outputs, stream), instance.project, p, work.projected);
}

}  // namespace seqkern::rnn::cuda

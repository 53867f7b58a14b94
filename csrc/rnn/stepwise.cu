// The kernels of the stepwise path: all of a token but its products.
#include "common/launch.h"
#include "common/random.h"
#include "common/time_scan.cuh"
#include "rnn/stepwise.cuh"

namespace seqkern::rnn::cuda {
namespace {

// What a token is to its row.
struct Moment {
  Span span;               // its sequence
  int64_t t;               // its place in memory, counted in all rows
  bool fresh;              // nothing of the token before reaches it
  int64_t initial, after;  // row of the initial state that enters, of the final one that follows; -1: none

  // `near`: the span of a neighbour.
  __device__ __forceinline__ Moment(const Inputs& in, int64_t b, int64_t tau, const Span& near = {}) {
    const Sequences& s = in.sequences;
    span = near;
    if (tau < near.begin || tau >= near.end) span = s.cu_seqlens ? packed_span_at(s, tau) : Span{0, s.length, b, false};
    t = b * s.length + memory_place(s, tau);
    const bool first = tau == span.begin, reset = in.reset && load(in.reset + t);
    fresh = first || reset;
    initial = first && !reset && !span.padding ? span.state : -1;
    after = tau + 1 == span.end && !span.padding ? span.state : -1;
  }
};

// Where the element lies in tensors of tokens, and in those of states.
template <typename Tensor>
__device__ __forceinline__ int64_t of_token(const Inputs& in, const Tensor& x, const Element& at, int64_t tau) {
  return at.b * x.b + memory_place(in.sequences, tau) * x.l + at.head * x.h + at.i;
}
__device__ __forceinline__ int64_t of_state(const Inputs& in, const Element& at, int64_t row, int64_t size, int k = 0) {
  return ((k * in.sequences.count + row) * in.heads + at.head) * size + at.i;
}

// What is carried from token to token: h (B, H, Q), then c (C, B, H, P).
template <typename R>
__device__ __forceinline__ R* carried_h(const Inputs& in, void* workspace, const Element& at) {
  return static_cast<R*>(workspace) + (at.b * in.heads + at.head) * in.outputs + at.i;
}
template <typename R>
__device__ __forceinline__ R* carried_c(const Inputs& in, void* workspace, const Element& at, int k) {
  const int64_t B = in.sequences.batch, H = in.heads;
  return static_cast<R*>(workspace) + B * H * in.outputs + ((k * B + at.b) * H + at.head) * in.units + at.i;
}

// Whether the event of `kind` happens to element q of a head, of four neighbours that share a call.
__device__ __forceinline__ bool happens_to(const Inputs& in, const Element& at, uint64_t first, RandomKind kind,
                                           double probability) {
  const int64_t element = at.head * in.outputs + at.i;
  const Random4 random = philox(static_cast<uint64_t>(load(in.seed)), first, static_cast<uint32_t>(element / 4),
                                static_cast<uint32_t>(kind));
  uint32_t word = random.word[0];
#pragma unroll
  for (int i = 1; i < 4; ++i) {
    if (element % 4 == i) word = random.word[i];
  }
  return happens(word, static_cast<float>(probability));
}

// [dropout] of h_{t-1}, and of its gradient.
template <typename R>
__device__ __forceinline__ R drop(const Inputs& in, const Element& at, const Moment& moment, R value) {
  if (!in.drops()) return value;
  if (happens_to(in, at, moment.span.state, kDropoutWords, in.recurrent_dropout)) return R(0);
  return value / (R(1) - static_cast<R>(in.recurrent_dropout));
}

// [zoneout]: the part of h_{t-1} in h_t.
template <typename R>
__device__ __forceinline__ R kept_part(const Inputs& in, const Element& at, const Moment& moment) {
  if (!in.training) return static_cast<R>(in.zoneout);
  return happens_to(in, at, moment.t, kZoneoutWords, in.zoneout) ? R(1) : R(0);
}
// Parts of 0 and 1 leave nothing of the other, NaN included.
template <typename R>
__device__ __forceinline__ R part_of(R part, R value) {
  return part == R(0) ? R(0) : part * value;
}

// What enters a token, `before` what the token before has left: carried, and of h made the operand of [recur].
template <typename R>
__device__ __forceinline__ void enter_h(const FwdParams& p, const FwdWork& work, const Element& at,
                                        const Moment& moment, R before) {
  R h = moment.fresh ? R(0) : before;
  if (moment.initial >= 0 && p.initial_h) h = load<R>(p.initial_h, of_state(p, at, moment.initial, p.outputs));
  store(carried_h<R>(p, p.workspace, at), h);
  put(work.operand, at.of_product(p.sequences.batch, p.outputs), drop(p, at, moment, h));
}
template <typename R>
__device__ __forceinline__ void enter_c(const FwdParams& p, const Element& at, const Moment& moment, int k, R before,
                                        R empty) {
  R c = moment.fresh ? empty : before;
  if (moment.initial >= 0 && p.initial_c) c = load<R>(p.initial_c, of_state(p, at, moment.initial, p.units, k));
  store(carried_c<R>(p, p.workspace, at, k), c);
}

// h_tau of what the cell or proj has made: the output, and what follows from it.
template <typename R>
__device__ __forceinline__ void leave_h(const FwdParams& p, const FwdWork& work, const Element& at, int64_t tau,
                                        const Moment& moment, R made) {
  R h = made;
  if (p.zones()) {  // [zoneout]
    const R kept = kept_part<R>(p, at, moment);
    h = part_of(kept, load(carried_h<R>(p, p.workspace, at))) + part_of(1 - kept, made);
  }
  if (moment.span.padding) h = R(0);
  put(p.h, of_token(p, p.h, at, tau), h);
  if (moment.after >= 0 && p.final_h) store(number<R>(p.final_h, of_state(p, at, moment.after, p.outputs)), h);
  if (tau + 1 < p.sequences.length) enter_h(p, work, at, Moment(p, at.b, tau + 1, moment.span), h);
}

// What enters the first token.
// thread   blockIdx.y 0: one element of h of a row; else of number blockIdx.y - 1 of c
template <typename R>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    begin_kernel(const __grid_constant__ FwdParams p, const __grid_constant__ FwdWork work, const float empty_log) {
  const int k = static_cast<int>(blockIdx.y) - 1;
  const int64_t size = k < 0 ? p.outputs : p.units;
  if (size == 0) return;
  const Element at(p.sequences.batch, p.heads, size);
  if (!at.exists) return;
  const Moment moment(p, at.b, 0);
  if (k < 0)
    enter_h(p, work, at, moment, R(0));
  else
    enter_c(p, at, moment, k, R(0), k == 1 ? static_cast<R>(empty_log) : R(0));
}

// u = product + bias [recur]; m, c = cell(x, u, c) [cell]; without proj h = m
// thread   one unit of one batch row
// bytes    x, product, h or m, operand once; c read and written; u and c again where they are kept
// limits   B H P / 128 < 2^31 blocks
template <int kCell, typename R>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    forward_kernel(const __grid_constant__ FwdParams p, const __grid_constant__ FwdWork work, const int64_t tau) {
  using C = CellOf<kCell, R>;
  const Element at(p.sequences.batch, p.heads, p.units);
  if (!at.exists) return;
  const Moment moment(p, at.b, tau);

  R x[C::kGates], u[C::kGates], c[kNumbers<kCell>] = {}, empty[kNumbers<kCell>];
  take(x, p.x, of_token(p, p.x, at, tau), p.x.g);
  take(u, work.product, at.of_product(p.sequences.batch, C::kGates * p.units), p.units);
  add_bias(u, p.bias, at, p.units);
  if (p.u) put(u, p.u, of_token(p, p.u, at, tau), p.u.g);
#pragma unroll
  for (int k = 0; k < C::kCarried; ++k) c[k] = load(carried_c<R>(p, p.workspace, at, k));
  const R h = C::kReadsH ? load(carried_h<R>(p, p.workspace, at)) : R(0);
  const R m = with_cell<kCell, R>(p.cell, [&](auto cell) { return decltype(cell)::step(x, u, h, c); });

#pragma unroll
  for (int k = 0; k < C::kCarried; ++k) {
    if (p.c) store(number<R>(p.c, k * p.c.c + of_token(p, p.c, at, tau)), c[k]);
    if (moment.after >= 0 && p.final_c) store(number<R>(p.final_c, of_state(p, at, moment.after, p.units, k)), c[k]);
  }
  if (C::kCarried > 0 && tau + 1 < p.sequences.length) {
    const Moment next(p, at.b, tau + 1, moment.span);
    C::empty(empty);
#pragma unroll
    for (int k = 0; k < C::kCarried; ++k) enter_c(p, at, next, k, c[k], empty[k]);
  }
  if (p.proj)
    put(work.m, at.of_product(p.sequences.batch, p.units), m);
  else
    leave_h(p, work, at, tau, moment, m);
}

// h = projected [proj]
// thread   one output of one batch row
template <typename R>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    project_kernel(const __grid_constant__ FwdParams p, const __grid_constant__ FwdWork work, const int64_t tau) {
  const Element at(p.sequences.batch, p.heads, p.outputs);
  if (!at.exists) return;
  leave_h(p, work, at, tau, Moment(p, at.b, tau), take<R>(work.projected, at.of_product(p.sequences.batch, p.outputs)));
}

// h_{tau-1}, as token tau finds it.
template <typename R>
__device__ __forceinline__ R before_h(const BwdParams& p, const Element& at, int64_t tau, const Moment& moment) {
  if (moment.initial >= 0 && p.initial_h) return load<R>(p.initial_h, of_state(p, at, moment.initial, p.outputs));
  return moment.fresh ? R(0) : take<R>(p.h, of_token(p, p.h, at, tau - 1));
}

// What token tau + 1 sends to h_tau [return].
template <typename R>
__device__ __forceinline__ R returned_to(const BwdParams& p, const BwdWork& work, const Element& at, int64_t tau,
                                         const Span& near) {
  if (tau + 1 == p.sequences.length) return R(0);
  const Moment next(p, at.b, tau + 1, near);
  R sent = drop(p, at, next, take<R>(work.returned, at.of_product(p.sequences.batch, p.outputs)));
  sent += load(carried_h<R>(p, p.workspace, at));
  if (p.grad_clip >= 0) {
    const R most = static_cast<R>(p.grad_clip);
    sent = sent > most ? most : sent < -most ? -most : sent;  // NaN stays
  }
  if (next.initial >= 0 && p.dinitial_h) store(number<R>(p.dinitial_h, of_state(p, at, next.initial, p.outputs)), sent);
  return next.fresh ? R(0) : sent;
}

// The gradient of what the cell or proj has made of h_tau. Leaves what reaches h_{tau-1} directly, and h_{tau-1} as the
// product read it.
template <typename R>
__device__ __forceinline__ R arrive_h(const BwdParams& p, const BwdWork& work, const Element& at, int64_t tau,
                                      const Moment& moment, R before, R& direct) {
  R dh = returned_to<R>(p, work, at, tau, moment.span);
  if (moment.after >= 0 && p.dfinal_h) dh = load(number<R>(p.dfinal_h, of_state(p, at, moment.after, p.outputs)));
  dh = moment.span.padding ? R(0) : dh + take<R>(p.dh, of_token(p, p.dh, at, tau));
  if (p.operand) put(p.operand, of_token(p, p.operand, at, tau), drop(p, at, moment, before));
  direct = R(0);
  if (!p.zones()) return dh;
  const R kept = kept_part<R>(p, at, moment);  // [zoneout]
  direct = part_of(kept, dh);
  return part_of(1 - kept, dh);
}

// dh = dh_t + what the next token sends [return]
// thread   one output of one batch row
template <typename R>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    return_kernel(const __grid_constant__ BwdParams p, const __grid_constant__ BwdWork work, const int64_t tau) {
  const Element at(p.sequences.batch, p.heads, p.outputs);
  if (!at.exists) return;
  if (tau < 0) {
    returned_to<R>(p, work, at, tau, {});
    return;
  }
  const Moment moment(p, at.b, tau);
  R direct;
  const R dh = arrive_h(p, work, at, tau, moment, before_h<R>(p, at, tau, moment), direct);
  put(work.dh, at.of_product(p.sequences.batch, p.outputs), dh);
  if (p.dh_total) put(p.dh_total, of_token(p, p.dh_total, at, tau), dh);
  store(carried_h<R>(p, p.workspace, at), direct);
}

// dx, du, dc = the cell's adjoint(dm, dc) [adjoint]; without proj dm = dh_t + what the next token sends [return]
// thread   one unit of one batch row
// bytes    x, u, c, h, dh, dx, du, what was returned once; dc read and written
// limits   B H P / 128 < 2^31 blocks
template <int kCell, typename R>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    backward_kernel(const __grid_constant__ BwdParams p, const __grid_constant__ BwdWork work, const int64_t tau) {
  using C = CellOf<kCell, R>;
  const Element at(p.sequences.batch, p.heads, p.units);
  if (!at.exists) return;
  const Moment moment(p, at.b, tau);

  const R h = p.proj ? R(0) : before_h<R>(p, at, tau, moment);
  R direct = R(0), dm;
  if (p.proj)
    dm = take<R>(work.dm, at.of_product(p.sequences.batch, p.units));
  else
    dm = arrive_h(p, work, at, tau, moment, h, direct);

  R x[C::kGates], u[C::kGates], dx[C::kGates], du[C::kGates];
  take(x, p.x, of_token(p, p.x, at, tau), p.x.g);
  take(u, p.u, of_token(p, p.u, at, tau), p.u.g);
  R c[kNumbers<kCell>] = {}, dc[kNumbers<kCell>] = {};
  C::empty(c);
#pragma unroll
  for (int k = 0; k < C::kCarried; ++k) {
    if (moment.initial >= 0 && p.initial_c)
      c[k] = load<R>(p.initial_c, of_state(p, at, moment.initial, p.units, k));
    else if (!moment.fresh)
      c[k] = load(number<R>(p.c, k * p.c.c + of_token(p, p.c, at, tau - 1)));
    if (moment.span.padding || moment.after >= 0)
      dc[k] = moment.after >= 0 && p.dfinal_c ? load(number<R>(p.dfinal_c, of_state(p, at, moment.after, p.units, k)))
                                              : R(0);
    else
      dc[k] = load(carried_c<R>(p, p.workspace, at, k));
  }
  if (p.m) {
    R of_token_c[kNumbers<kCell>];
#pragma unroll
    for (int k = 0; k < C::kCarried; ++k) of_token_c[k] = c[k];
    put(p.m, of_token(p, p.m, at, tau),
        with_cell<kCell, R>(p.cell, [&](auto cell) { return decltype(cell)::step(x, u, h, of_token_c); }));
  }

  direct += with_cell<kCell, R>(p.cell, [&](auto cell) { return decltype(cell)::adjoint(x, u, h, c, dm, dc, dx, du); });
  put(dx, p.dx, of_token(p, p.dx, at, tau), p.dx.g);
  put(C::kTwoSides ? du : dx, work.du, at.of_product(p.sequences.batch, C::kGates * p.units), p.units);
  if (C::kTwoSides && p.du_last) put(p.du_last, of_token(p, p.du_last, at, tau), du[C::kGates - 1]);
#pragma unroll
  for (int k = 0; k < C::kCarried; ++k) {
    if (moment.initial >= 0 && p.dinitial_c)
      store(number<R>(p.dinitial_c, of_state(p, at, moment.initial, p.units, k)), dc[k]);
    store(carried_c<R>(p, p.workspace, at, k), moment.fresh ? R(0) : dc[k]);
  }
  if (!p.proj) store(carried_h<R>(p, p.workspace, at), direct);
}

// thread   number blockIdx.y of the state of one unit of a sequence without tokens
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    pass_kernel(const __grid_constant__ Sequences s, const int64_t columns, const __grid_constant__ Array from,
                const __grid_constant__ Array to, const float empty_log) {
  time_scan::pass_states(s, columns, from, to, blockIdx.y == 1 ? empty_log : 0.0f, blockIdx.y);
}

struct Instance {
  DType accumulator;
  void (*begin)(FwdParams, FwdWork, float);
  void (*forward[kCellKernels])(FwdParams, FwdWork, int64_t);
  void (*project)(FwdParams, FwdWork, int64_t);
  void (*backward[kCellKernels])(BwdParams, BwdWork, int64_t);
  void (*send_back)(BwdParams, BwdWork, int64_t);
};
template <typename R>
constexpr Instance kInstance = {
    kDType<R>,
    begin_kernel<R>,
    {forward_kernel<0, R>, forward_kernel<1, R>, forward_kernel<2, R>, forward_kernel<3, R>},
    project_kernel<R>,
    {backward_kernel<0, R>, backward_kernel<1, R>, backward_kernel<2, R>, backward_kernel<3, R>},
    return_kernel<R>};

constexpr Instance kInstances[] = {kInstance<float>, kInstance<double>};
static_assert(std::size(kInstances) * (3 + 2 * kCellKernels) + 1 == kStepwiseKernels);

const Instance& instance_of(const Inputs& in) {
  return find_instance(kInstances, "rnn_stepwise", [&](const Instance& i) { return i.accumulator == in.accumulator; });
}

// A kernel with a thread for each of `size` elements of every row and head.
Launch of_elements(const char* name, const Inputs& in, int64_t size, Stream stream) {
  return {.name = name,
          .grid = {ceil_div(in.sequences.batch * in.heads * size, kThreads)},
          .threads = kThreads,
          .stream = stream};
}

float empty_log_of(const Inputs& in) {
  return in.cell == Cell::kSlstm ? -INFINITY : 0.0f;  // of n, whose empty one is 0
}

// States of `size` units: (numbers, N, H, size).
void pass_states(const Inputs& in, int64_t size, int numbers, const Array& from, const Array& to, float empty_log,
                 Stream stream) {
  if (!to || !time_scan::may_be_empty(in.sequences)) return;
  const int64_t columns = in.heads * size;
  launch({.name = "rnn_pass_states",
          .grid = {ceil_div(in.sequences.count * columns, kThreads), numbers},
          .threads = kThreads,
          .stream = stream},
         pass_kernel, in.sequences, columns, from, to, empty_log);
}

}  // namespace

void begin(const FwdParams& p, const FwdWork& work, Stream stream) {
  pass_states(p, p.outputs, 1, p.initial_h, p.final_h, 0, stream);
  pass_states(p, p.units, p.sizes().carried, p.initial_c, p.final_c, empty_log_of(p), stream);
  if (p.sequences.length == 0) return;
  Launch how = of_elements("rnn_begin", p, at_least(p.outputs, p.units), stream);
  how.grid.y = 1 + p.sizes().carried;
  launch(how, instance_of(p).begin, p, work, empty_log_of(p));
}

void forward_step(const FwdParams& p, const FwdWork& work, int64_t tau, Stream stream) {
  launch(of_elements("rnn_forward_step", p, p.units, stream), instance_of(p).forward[kernel_of(p.cell)], p, work, tau);
}

void project_step(const FwdParams& p, const FwdWork& work, int64_t tau, Stream stream) {
  launch(of_elements("rnn_project_step", p, p.outputs, stream), instance_of(p).project, p, work, tau);
}

void begin(const BwdParams& p, const BwdWork&, Stream stream) {
  pass_states(p, p.outputs, 1, p.dfinal_h, p.dinitial_h, 0, stream);
  pass_states(p, p.units, p.sizes().carried, p.dfinal_c, p.dinitial_c, 0, stream);
}

void return_step(const BwdParams& p, const BwdWork& work, int64_t tau, Stream stream) {
  launch(of_elements("rnn_return_step", p, p.outputs, stream), instance_of(p).send_back, p, work, tau);
}

void backward_step(const BwdParams& p, const BwdWork& work, int64_t tau, Stream stream) {
  launch(of_elements("rnn_backward_step", p, p.units, stream), instance_of(p).backward[kernel_of(p.cell)], p, work,
         tau);
}

}  // namespace seqkern::rnn::cuda

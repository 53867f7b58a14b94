// The forward: a scan, on one of the three paths of common/time_tile.h.
#include "common/launch.h"
#include "linear_scan/scan.cuh"

namespace seqkern::linear_scan::cuda {
namespace {

using time_scan::Cut;
using time_scan::Line;
using time_scan::Pass;
using time_scan::Place;

// h_t = a_t h_{t-1} + b_t [state]; the state carried is h_t.
template <typename S>
struct Forward : Maps<S> {
  using typename Maps<S>::Carry;
  using typename Maps<S>::Element;
  using typename Maps<S>::Real;
  static constexpr int kTokens = fwd_tokens(kDType<Real>, kIsComplex<S>);
  struct Tokens {
    S a[kTokens], b[kTokens];  // h in place of b
  };

  __device__ __forceinline__ Forward(const FwdParams& params, const Place& place)
      : p(params),
        place(place),
        a_line(line_of(p.a, p.sequences, place)),
        b_line(line_of(p.b, p.sequences, place)),
        h_line(line_of(p.h, p.sequences, place)) {}

  __device__ __forceinline__ void fetch(int64_t tau) { a.fetch(a_line, tau), b.fetch(b_line, tau); }
  __device__ __forceinline__ Tokens take() const {
    Tokens x;
    take_decays(x.a, a, a_line, p.log_space);
    b.decode(b_line, [&](int i, S given) { x.b[i] = given; });
    return x;
  }
  __device__ __forceinline__ void store(const Tokens& x, int64_t tau) const {
    time_scan::store_tokens(h_line, tau, x.b);
  }

  __device__ __forceinline__ static void advance(Carry& h, const Tokens& x, int i) { h = madd(x.a[i], h, x.b[i]); }
  __device__ __forceinline__ static void extend(Element& f, const Tokens& x, int i) {
    f = seqkern::compose({x.a[i], x.b[i]}, f);
  }
  __device__ __forceinline__ void emit(Carry& h, Tokens& x, const time_scan::Token& t) const {
    advance(h, x, t.i);
    x.b[t.i] = h;
  }
  __device__ __forceinline__ void leave(const Carry& h, int64_t row) const {
    if (place.exists) time_scan::store_number(p.final_state, row * p.channels + place.channel, h);
  }
  __device__ __forceinline__ static void pad(Tokens& x, int i) { x.b[i] = S{}; }

  __device__ __forceinline__ bool reads_initial() const { return static_cast<bool>(p.initial_state); }
  __device__ __forceinline__ bool reads_final() const { return static_cast<bool>(p.final_state); }
  __device__ __forceinline__ Carry initial(int64_t row, int64_t) const {
    if (row < 0 || !place.exists) return S{};
    return time_scan::load_number<S>(p.initial_state, row * p.channels + place.channel);
  }

 private:
  const FwdParams& p;
  const Place& place;
  Line a_line, b_line, h_line;
  time_scan::Fetched<S, kTokens> a, b;
};

// h_t = a_t h_{t-1} + b_t [state], a_t of [decay]
// warp     32 channels of one batch row, from the first token to the last
// thread   one channel; chunks of tokens in registers, the next one on its way
// bytes    a, b, h once
// limits   B D / 128 < 2^31 blocks
template <typename R, bool kComplex>
__global__ void __launch_bounds__(time_scan::kSerialWarps* kWarpSize, kTile.serial_blocks)
    serial_kernel(const __grid_constant__ FwdParams p, const __grid_constant__ Cut cut) {
  const Place place(cut, p.channels);
  if (!place.chain_exists) return;
  Forward<Scalar<R, kComplex>> forward(p, place);
  time_scan::serial_scan(forward, p.sequences, p.reset, false, place.b);
}

// The same with time cut.
// block    one tile: 32 channels of one batch row, 8 chunks of tokens
// warp     one chunk
// thread   one channel of it, in registers
// shared   what the chunks do to a state
// bytes    a, b, h once; in a pass that summarizes a, b
// limits   tiles B D / 32 < 2^31 blocks
template <typename R, bool kComplex>
__global__ void __launch_bounds__(time_scan::kTileWarps* kWarpSize, kTile.tile_blocks)
    tile_kernel(const __grid_constant__ FwdParams p, const __grid_constant__ Cut cut, const Pass pass) {
  const Place place(cut, p.channels);
  Forward<Scalar<R, kComplex>> forward(p, place);
  time_scan::tile_scan(forward, p.sequences, p.reset, false, place, cut, p.workspace, pass);
}

__global__ void __launch_bounds__(kSmallThreads, 4) clear_kernel(const __grid_constant__ Cut cut, void* workspace) {
  time_scan::clear_flags(cut, workspace);
}

// thread   one element of the states of sequences without tokens
__global__ void __launch_bounds__(kSmallThreads, 4)
    pass_kernel(const __grid_constant__ Sequences s, const int64_t columns, const __grid_constant__ Array from,
                const __grid_constant__ Array to) {
  time_scan::pass_states(s, columns, from, to, 0.0f);
}

struct Instance {
  DType accumulator;
  bool complex;
  void (*serial)(FwdParams, Cut);
  void (*tile)(FwdParams, Cut, Pass);
};

constexpr Instance kInstances[] = {
    {DType::kFloat32, false, serial_kernel<float, false>, tile_kernel<float, false>},
    {DType::kFloat32, true, serial_kernel<float, true>, tile_kernel<float, true>},
    {DType::kFloat64, false, serial_kernel<double, false>, tile_kernel<double, false>},
    {DType::kFloat64, true, serial_kernel<double, true>, tile_kernel<double, true>},
};
static_assert(2 * std::size(kInstances) + 2 == kFwdKernels);

}  // namespace

void fwd(const FwdParams& p, Stream stream) {
  fwd(p, plan_fwd(p), stream);
}

void fwd(const FwdParams& p, const FwdPlan& plan, Stream stream) {
  const Instance& instance = find_instance(kInstances, "linear_scan_fwd", [&](const Instance& i) {
    return i.accumulator == p.accumulator && i.complex == p.complex;
  });
  if (p.final_state && may_be_empty(p.sequences)) pass_states(p, p.initial_state, p.final_state, stream);

  const Launch scan{.name = "linear_scan_fwd",
                    .grid = {plan.cut.blocks},
                    .threads = plan.cut.threads,
                    .smem_bytes = plan.smem_bytes,
                    .stream = stream};
  time_scan::run_path(
      plan.cut, [&] { launch(scan, instance.serial, p, plan.cut); },
      [&](Pass pass) { launch(scan, instance.tile, p, plan.cut, pass); },
      [&] { clear_flags(plan.cut, p.workspace, stream); });
}

void clear_flags(const Cut& cut, void* workspace, Stream stream) {
  launch({.name = "linear_scan_clear",
          .grid = {ceil_div(cut.blocks, kSmallThreads)},
          .threads = kSmallThreads,
          .stream = stream},
         clear_kernel, cut, workspace);
}

void pass_states(const Inputs& in, const Array& from, const Array& to, Stream stream) {
  const int64_t columns = in.channels * in.parts();
  launch({.name = "linear_scan_pass_states",
          .grid = {ceil_div(in.sequences.count * columns, kSmallThreads)},
          .threads = kSmallThreads,
          .stream = stream},
         pass_kernel, in.sequences, columns, from, to);
}

}  // namespace seqkern::linear_scan::cuda

// The forward: which solver, and the serial one.
#include "common/launch.h"
#include "elementwise_rnn/walk.cuh"

namespace seqkern::elementwise_rnn::cuda {
namespace {

using time_scan::Cut;
using time_scan::Place;

// s_t = cell(x_t, s_{t-1}) [cell]; the state carried is s_t.
template <int kCell, typename R>
struct Serial : Channel<kCell, R> {
  using Base = Channel<kCell, R>;
  using Carry = State<R, Base::kStates>;
  using Base::Base;

  __device__ __forceinline__ void emit(Carry& carry, typename Base::Tokens&, const time_scan::Token& t) {
    R x[Base::kGates];
    this->take_token(t.i, carry.s, x);
    Base::Cell::step(this->w, x, carry.s);
    this->put_token(t.i, carry.s[0]);
  }
  __device__ __forceinline__ Carry initial(int64_t row, int64_t) const { return this->state_of(row); }
};

// s_t = cell(x_t, s_{t-1}) [cell]
// warp     32 channels of one batch row, from the first token to the last
// thread   one channel; of chunks of tokens the next one is on its way in registers
// shared   the gates of a chunk, a lane's own
// bytes    x, h once
// limits   B D / 128 < 2^31 blocks
template <int kCell, typename R>
__global__ void __launch_bounds__(time_scan::kSerialWarps* kWarpSize, tile_of(sizeof(R)).serial_blocks)
    serial_kernel(const __grid_constant__ FwdParams p, const __grid_constant__ Cut cut, const bool* marked) {
  using Walk = Serial<kCell, R>;
  const Place place(cut, p.channels);
  if (!place.chain_exists) return;
  const bool mine = place.exists && (!marked || load(marked + place.chain * kWarpSize + time_scan::lane_of()));
  if (!__any_sync(0xffffffffu, mine)) return;

  auto& slots = shared_memory<typename Walk::Slots[time_scan::kSerialWarps]>();
  Walk walk(p, place, slots[time_scan::warp_of()], mine);
  time_scan::serial_scan(walk, sequences_of(p), p.reset, false, place.b);
  if (mine && !marked) report(p, place, 0, 0.0f, false);
}

// thread   number blockIdx.y of the state of one channel of a sequence without tokens
__global__ void __launch_bounds__(kSmallThreads, 4)
    pass_kernel(const __grid_constant__ Sequences s, const int64_t channels, const __grid_constant__ Array from,
                const __grid_constant__ Array to, const float absent) {
  time_scan::pass_states(s, channels, from, to, blockIdx.y == 2 ? absent : 0.0f, blockIdx.y);
}

struct Instance {
  Cell cell;
  DType accumulator;
  void (*kernel)(FwdParams, Cut, const bool*);
};
template <Cell kCell, typename R>
constexpr Instance kInstance = {kCell, kDType<R>, serial_kernel<static_cast<int>(kCell), R>};

constexpr Instance kInstances[] = {
    kInstance<Cell::kGru, float>,    kInstance<Cell::kGru, double>,    kInstance<Cell::kLstm, float>,
    kInstance<Cell::kLstm, double>,  kInstance<Cell::kSlstm, float>,   kInstance<Cell::kSlstm, double>,
    kInstance<Cell::kIndRnn, float>, kInstance<Cell::kIndRnn, double>, kInstance<Cell::kElman, float>,
    kInstance<Cell::kElman, double>,
};
static_assert(std::size(kInstances) + 1 == kFwdKernels);

}  // namespace

void fwd(const FwdParams& p, Stream stream) {
  fwd(p, plan_fwd(p), stream);
}

void fwd(const FwdParams& p, const FwdPlan& plan, Stream stream) {
  if (p.final_state && may_be_empty(p.sequences)) pass_states(p, p.initial_state, p.final_state, false, stream);
  if (plan.solver == Solver::kShooting) return shooting(p, plan, stream);
  if (plan.solver == Solver::kNewton) return newton(p, plan, stream);
  serial(p, nullptr, stream);
}

void serial(const FwdParams& p, const bool* marked, Stream stream) {
  const Instance& instance = find_instance(kInstances, "elementwise_rnn_fwd", [&](const Instance& i) {
    return i.cell == p.cell && i.accumulator == p.accumulator;
  });
  const Cut cut = cut_chains(p);
  launch({.name = "elementwise_rnn_serial",
          .grid = {cut.blocks},
          .threads = cut.threads,
          .smem_bytes = walk_smem_bytes(shape_of(p.cell, p.accumulator)),
          .stream = stream},
         instance.kernel, p, cut, marked);
}

void pass_states(const Inputs& in, const Array& from, const Array& to, bool gradients, Stream stream) {
  const bool logarithm = in.cell == Cell::kSlstm && !gradients;  // of n, whose empty one is 0
  launch({.name = "elementwise_rnn_pass_states",
          .grid = {ceil_div(in.sequences.count * in.channels, kSmallThreads), in.sizes().states},
          .threads = kSmallThreads,
          .stream = stream},
         pass_kernel, in.sequences, in.channels, from, to, logarithm ? -INFINITY : 0.0f);
}

}  // namespace seqkern::elementwise_rnn::cuda

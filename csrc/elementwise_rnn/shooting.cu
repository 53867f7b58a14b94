// Shooting: the unknowns are the states s_p with which the P chunks of a row begin. A launch per sweep, and one more
// that repairs; nothing waits for the host.
//
//   [sweep]     s_t = cell(x_t, s_{t-1}) from s_p on; M_t = d s_t / d s_p; F_p, M_p at the end; N_p = max |M_t|;
//               R_t = max(|J_t| R_{t-1}, rounding of s_t), what has grown of any rounding; R_p, Q_p likewise
//   [correct]   s_{p+1} <- F_p + M_p (change of s_p)
//   [estimate]  e_{p+1} = |M_p| e_p + R_p + |F_p - s_{p+1}|, e_0 = 0; within chunk p states are off by at most
//               N_p e_p + Q_p; without R_p and Q_p where e_p = 0, since equal states are rounded alike
//
// max and |.| are elementwise; the estimate is of first order. A launch begins with [correct] and [estimate], which
// every warp works out for itself from what the sweep before it left: launches read one of two boards and write the
// other.
#include "common/launch.h"
#include "elementwise_rnn/solve.cuh"

namespace seqkern::elementwise_rnn::cuda {
namespace {

using time_scan::Cut;
using time_scan::kSerialWarps;
using time_scan::Place;

struct Sweep {
  int64_t chunk, chunks;  // tokens of a chunk, P
  int number;             // of this launch, from 1 on
  bool repairs;           // it is the last
  void* chunks_board;     // (2, chains, P, chunk_numbers, 32), first index number % 2
  bool* accepted_board;   // (2, chains, 32)
};

// What a sweep found in a chunk of one channel.
template <typename R, int S>
struct Chunk {
  R begins[S], ends[S];  // s_p, F_p
  R m[S][S], n[S][S];
  R r[S], q[S];

  static constexpr int kAtOnce = S == 1 && sizeof(R) == 4 ? 8 : S == 1 ? 4 : S == 2 ? 2 : 1;  // that are read
};

template <typename R, int S>
class Board {
  static constexpr int kNumbers = chunk_numbers(S);
  static_assert(sizeof(Chunk<R, S>) == kNumbers * sizeof(R));

 public:
  // Of sweep `number`.
  __device__ __forceinline__ Board(const Sweep& sweep, int number, const Cut& cut, const Place& place) {
    const int64_t chain = number % 2 * cut.chains + place.chain;
    numbers_ = static_cast<R*>(sweep.chunks_board) + chain * sweep.chunks * kNumbers * kWarpSize + time_scan::lane_of();
    accepted_ = sweep.accepted_board + chain * kWarpSize + time_scan::lane_of();
  }

  __device__ __forceinline__ Chunk<R, S> read(int64_t p) const {
    R numbers[kNumbers];
#pragma unroll
    for (int k = 0; k < kNumbers; ++k) numbers[k] = load(numbers_ + (p * kNumbers + k) * kWarpSize);
    Chunk<R, S> chunk;
    memcpy(&chunk, numbers, sizeof(chunk));
    return chunk;
  }
  __device__ __forceinline__ void write(int64_t p, const Chunk<R, S>& chunk) const {
    R numbers[kNumbers];
    memcpy(numbers, &chunk, sizeof(chunk));
#pragma unroll
    for (int k = 0; k < kNumbers; ++k) store(numbers_ + (p * kNumbers + k) * kWarpSize, numbers[k]);
  }

  // Whether the channel was accepted before this sweep began.
  __device__ __forceinline__ bool accepted() const { return load(accepted_); }
  __device__ __forceinline__ void set_accepted(bool accepted) const { store(accepted_, accepted); }

 private:
  R* numbers_;
  bool* accepted_;
};

template <typename R, int S>
struct Verdict {
  R enters[S];  // the chunk that was asked for, corrected
  R estimate;
  bool accepted;
};

// [correct], [estimate]
template <typename R, int S>
__device__ __forceinline__ Verdict<R, S> judge(const FwdParams& p, const Board<R, S>& board, int64_t chunks,
                                               int64_t asked) {
  Verdict<R, S> verdict{{}, R(0), true};
  R s[S], arrives[S], e[S] = {};  // s_q, F_{q-1}, |M_{q-1}| e_{q-1}
#pragma unroll(Chunk<R, S>::kAtOnce)
  for (int64_t q = 0; q < chunks; ++q) {
    const Chunk<R, S> chunk = board.read(q);
    R change[S];
#pragma unroll
    for (int i = 0; i < S; ++i) {
      if (q == 0) s[i] = arrives[i] = chunk.begins[i];
      if (q == asked) verdict.enters[i] = s[i];
      change[i] = difference(s[i], chunk.begins[i]);
      e[i] += fabs(difference(arrives[i], chunk.begins[i]));
    }
    const bool differs = any_error(e);
    R next[S];
#pragma unroll
    for (int i = 0; i < S; ++i) {
      const R within = larger(e[i], add_sizes(differs ? chunk.q[i] : R(0), chunk.n[i], e));
      verdict.estimate = larger(within, verdict.estimate);
      verdict.accepted &= within <= allowed(p, chunk.begins[i], chunk.ends[i]);
      next[i] = add_sizes(differs ? chunk.r[i] : R(0), chunk.m[i], e);
      arrives[i] = chunk.ends[i];
      s[i] = corrected(chunk.ends[i], chunk.m[i], change);
    }
#pragma unroll
    for (int i = 0; i < S; ++i) e[i] = next[i];
  }
  return verdict;
}

// [sweep]
template <int kCell, typename R>
struct Shot : Channel<kCell, R> {
  using Base = Channel<kCell, R>;
  static constexpr int S = Base::kStates;
  struct Carry : State<R, S> {
    R m[S][S], r[S];
  };
  using Base::Base;

  __device__ __forceinline__ void emit(Carry& carry, typename Base::Tokens&, const time_scan::Token& t) {
    R x[Base::kGates], jacobian[S][S];
    this->take_token(t.i, carry.s, x);
    Base::Cell::tangent(this->w, x, carry.s, jacobian);
    this->put_token(t.i, carry.s[0]);
    extend(carry.m, n, jacobian);
    R grown[S];
#pragma unroll
    for (int i = 0; i < S; ++i) {
      grown[i] = larger(add_sizes(R(0), jacobian[i], carry.r), rounding(carry.s[i]));
      q[i] = larger(grown[i], q[i]);
    }
    memcpy(carry.r, grown, sizeof(grown));
  }
  // What follows does not depend on s_p.
  __device__ __forceinline__ Carry initial(int64_t row, int64_t) const { return {this->state_of(row), {}, {}}; }

  R n[S][S] = {}, q[S] = {};
};

// [sweep], [correct], [estimate]
// warp     a chunk of 32 channels of one batch row; where it repairs, what follows the last chunk that is exact
// thread   one channel; of chunks of tokens the next one is on its way in registers
// shared   the gates of a chunk, a lane's own
// bytes    x once, and from the second sweep on h; 2 S (2 + S) numbers of each chunk, read by all warps of the chain
// limits   tiles B D / 32 < 2^31 blocks
template <int kCell, typename R>
__global__ void __launch_bounds__(kSerialWarps* kWarpSize, tile_of(sizeof(R)).sweep_blocks)
    sweep_kernel(const __grid_constant__ FwdParams p, const __grid_constant__ Cut cut,
                 const __grid_constant__ Sweep sweep) {
  using Walk = Shot<kCell, R>;
  constexpr int S = Walk::S;
  const Place place(cut, p.channels);
  if (!place.chain_exists) return;
  // After k sweeps k chunks are exact. The first sweep stores nothing.
  const int64_t exact = sweep.number > 2 ? min(int64_t{sweep.number - 1}, sweep.chunks) : 0;
  const int64_t chunk = sweep.repairs ? exact : place.tile * kSerialWarps + time_scan::warp_of();
  if (!sweep.repairs && chunk >= sweep.chunks) return;

  const Board<R, S> board(sweep, sweep.number, cut, place);
  typename Walk::Carry carry{};
  Walk::Cell::guess(carry.s);
  bool done = !place.exists;
  if (sweep.number > 1) {
    const Board<R, S> before(sweep, sweep.number - 1, cut, place);
    const bool speaks = sweep.repairs || chunk == 0;
    done = done || before.accepted();
    if (!__all_sync(0xffffffffu, done)) {
      const Verdict<R, S> verdict = judge(p, before, sweep.chunks, chunk);
      const bool accepted = verdict.accepted && sweep.number > 2;
      if (!done && speaks && (accepted || sweep.repairs))
        report(p, place, sweep.number - 1, static_cast<float>(verdict.estimate), !accepted);
      done = done || accepted;
#pragma unroll
      for (int i = 0; i < S; ++i) carry.s[i] = verdict.enters[i];
    }
  }
  if (!sweep.repairs && chunk == 0) board.set_accepted(done);
  if (__all_sync(0xffffffffu, done)) return;

  Chunk<R, S> found;
#pragma unroll
  for (int i = 0; i < S; ++i) found.begins[i] = carry.s[i], carry.m[i][i] = R(1);
  auto& slots = shared_memory<typename Walk::Slots[kSerialWarps]>();
  Walk walk(p, place, slots[time_scan::warp_of()], sweep.number > 1 && !done);
  const int64_t begin = chunk * sweep.chunk;
  const int64_t end = sweep.repairs ? p.sequences.length : min(begin + sweep.chunk, p.sequences.length);
  carry = time_scan::serial_scan(walk, sequences_of(p), p.reset, false, place.b, begin, end, carry);
  if (sweep.repairs) return;
  memcpy(found.ends, carry.s, sizeof(found.ends)), memcpy(found.m, carry.m, sizeof(found.m));
  memcpy(found.n, walk.n, sizeof(found.n));
  memcpy(found.r, carry.r, sizeof(found.r)), memcpy(found.q, walk.q, sizeof(found.q));
  board.write(chunk, found);
}

struct Instance {
  Cell cell;
  DType accumulator;
  void (*kernel)(FwdParams, Cut, Sweep);
};
template <Cell kCell, typename R>
constexpr Instance kInstance = {kCell, kDType<R>, sweep_kernel<static_cast<int>(kCell), R>};

constexpr Instance kInstances[] = {
    kInstance<Cell::kGru, float>,    kInstance<Cell::kGru, double>,    kInstance<Cell::kLstm, float>,
    kInstance<Cell::kLstm, double>,  kInstance<Cell::kSlstm, float>,   kInstance<Cell::kSlstm, double>,
    kInstance<Cell::kIndRnn, float>, kInstance<Cell::kIndRnn, double>, kInstance<Cell::kElman, float>,
    kInstance<Cell::kElman, double>,
};
static_assert(std::size(kInstances) == kShootingKernels);

}  // namespace

void shooting(const FwdParams& p, const FwdPlan& plan, Stream stream) {
  const Instance& instance = find_instance(kInstances, "elementwise_rnn_fwd", [&](const Instance& i) {
    return i.cell == p.cell && i.accumulator == p.accumulator;
  });
  Sweep sweep{.chunk = plan.chunk,
              .chunks = plan.chunks,
              .number = 1,
              .repairs = false,
              .chunks_board = p.workspace,
              .accepted_board = static_cast<bool*>(p.workspace) + plan.flags_at};
  for (; sweep.number <= plan.sweeps + 1; ++sweep.number) {
    sweep.repairs = sweep.number > plan.sweeps;
    const Cut cut = sweep.repairs ? cut_chains(p) : plan.cut;
    launch({.name = "elementwise_rnn_shooting",
            .grid = {cut.blocks},
            .threads = cut.threads,
            .smem_bytes = plan.smem_bytes,
            .stream = stream},
           instance.kernel, p, cut, sweep);
  }
}

}  // namespace seqkern::elementwise_rnn::cuda

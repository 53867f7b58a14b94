// Newton's method: the unknowns are the states at all tokens of a tile; tiles follow one after the other, each from the
// state that the one before it found. In a pass over a tile, with s_t as known so far and s_0 exact in the first chunk,
//
//   f_t = cell(x_t, s_{t-1}),  J_t its Jacobian,  M_t = J_t ... J_1 from where the chunk begins
//   [correct]   s_t <- f_t + J_t d_{t-1}, where d is the change: J d within the chunk, M d between chunks
//   [estimate]  e_t = |J_t| e_{t-1} + |f_t - s_t|, where e_{t-1} is not 0 at least the rounding of s_t
//
// The estimate is one of the states before the pass corrects them, and bounds how far it does. Where it is small
// enough a channel is corrected for the last time; the pass after that is the proof.
#include "common/launch.h"
#include "elementwise_rnn/solve.cuh"

namespace seqkern::elementwise_rnn::cuda {
namespace {

using time_scan::Cut;
using time_scan::kTileWarps;
using time_scan::lane_of;
using time_scan::Place;
using time_scan::warp_of;

template <int kCell, typename R>
constexpr int kNewtonTokens = newton_tokens({CellOf<kCell, R>::kGates, CellOf<kCell, R>::kStates, sizeof(R)});

template <int kCell, typename R>
struct Room {
  static constexpr int S = CellOf<kCell, R>::kStates, kTokens = kNewtonTokens<kCell, R>;
  // Of each token of a warp's chunk; a lane's own.
  typename Channel<kCell, R, kTokens>::Slots slots[kTileWarps];
  R s[kTileWarps][kTokens][S][kWarpSize], m[kTileWarps][kTokens][S][S][kWarpSize];
  // Of each warp: d and e at the end of its chunk had it begun with none, and s there.
  R d[kTileWarps][S][kWarpSize], e[kTileWarps][S][kWarpSize], ends[kTileWarps][S][kWarpSize];
  R estimate[kTileWarps][kWarpSize];
  uint32_t votes[kTileWarps];

  static constexpr int64_t kBytes = newton_smem_bytes({CellOf<kCell, R>::kGates, S, sizeof(R)});
};

// A warp's chunk of a tile. As a recurrence it walks through the states found, for the outputs.
template <int kCell, typename R>
class Iterate : public Channel<kCell, R, kNewtonTokens<kCell, R>> {
  using Base = Channel<kCell, R, kNewtonTokens<kCell, R>>;
  static constexpr int S = Base::kStates;

 public:
  using Base::kTokens;
  using Carry = State<R, S>;

  __device__ __forceinline__ Iterate(const FwdParams& params, const Place& place, Room<kCell, R>& shared)
      : Base(params, place, shared.slots[warp_of()], true), p(params), room(shared) {}

  // f_t, J_t and what follows from them within the chunk. A first guess knows no s_{t-1} and takes the empty state.
  // `moves`: the states become those corrected by what is within the chunk.
  __device__ __forceinline__ void linearize(const time_scan::Timeline<kTokens>& time, const time_scan::Facts& facts,
                                            int64_t tau, const Carry& before, bool guesses, bool moves) {
    Carry s = before;
    R d[S] = {}, e[S] = {}, m[S][S] = {};
    memset(n_, 0, sizeof(n_)), memset(worst_, 0, sizeof(worst_));
#pragma unroll
    for (int i = 0; i < S; ++i) m[i][i] = R(1);
#pragma unroll 1
    for (int t = 0; t < facts.count; ++t) {
      if (guesses || (facts.fresh >> t & 1u)) {
        s = this->state_of(!guesses && p.initial_state ? time.initial_row(facts, tau, t) : -1);
        memset(d, 0, sizeof(d)), memset(e, 0, sizeof(e)), memset(m, 0, sizeof(m));
      }
      R x[Base::kGates], jacobian[S][S];
      this->gates_of(t, x);
      Base::Cell::tangent(this->w, x, s.s, jacobian);
      extend(m, n_, jacobian);
      const bool differs = any_error(e);  // states that are equal are rounded alike
      R next_d[S], next_e[S];
#pragma unroll
      for (int i = 0; i < S; ++i) {
        R& state = room.s[warp_of()][t][i][lane_of()];
        const R f = s.s[i], was = state, now = corrected(f, jacobian[i], d);
        next_d[i] = difference(now, was);
        next_e[i] = add_sizes(R(fabs(difference(f, was))), jacobian[i], e);
        if (differs) next_e[i] = larger(next_e[i], rounding(was));
        worst_[i] = larger(next_e[i], worst_[i]);
        if (moves) state = now;
        s.s[i] = was;
#pragma unroll
        for (int j = 0; j < S; ++j) room.m[warp_of()][t][i][j][lane_of()] = m[i][j];
      }
#pragma unroll
      for (int i = 0; i < S; ++i) d[i] = next_d[i], e[i] = next_e[i];
    }
#pragma unroll
    for (int i = 0; i < S; ++i) {
      room.d[warp_of()][i][lane_of()] = d[i], room.e[warp_of()][i][lane_of()] = e[i];
    }
  }

  // From the error with which the tile begins: change and error with which the chunk begins, error at the tile's end.
  // What follows a chunk that ends with the row is of no concern.
  __device__ __forceinline__ void fold(const R (&error)[S], R (&d)[S], R (&e)[S], R (&leaves)[S]) const {
    R change[S] = {};
    memcpy(leaves, error, sizeof(error));
#pragma unroll 1
    for (int w = 0; w < kTileWarps; ++w) {
      if (w == warp_of()) memcpy(d, change, sizeof(d)), memcpy(e, leaves, sizeof(e));
      const bool differs = any_error(leaves);
      R next_change[S], next_error[S];
#pragma unroll
      for (int i = 0; i < S; ++i) {
        R row[S];
#pragma unroll
        for (int j = 0; j < S; ++j) row[j] = room.m[w][kTokens - 1][i][j][lane_of()];
        next_change[i] = add_product(room.d[w][i][lane_of()], row, change);
        next_error[i] = add_sizes(room.e[w][i][lane_of()], row, leaves);
        if (differs) next_error[i] = larger(next_error[i], rounding(room.ends[w][i][lane_of()]));
      }
      memcpy(change, next_change, sizeof(change)), memcpy(leaves, next_error, sizeof(leaves));
    }
  }

  // The largest error within the chunk, and whether all are small enough; after the row there are none.
  __device__ __forceinline__ R judge(const R (&e)[S], const Carry& before, int count, bool& settled) const {
    R largest = R(0);
    settled = true;
    if (count == 0) return largest;
#pragma unroll
    for (int i = 0; i < S; ++i) {
      const R within = larger(worst_[i], add_sizes(worst_[i], n_[i], e));
      settled &= within <= allowed(p, before.s[i], room.ends[warp_of()][i][lane_of()]);
      largest = larger(within, largest);
    }
    return largest;
  }

  // [correct] for a change d of the state that enters the chunk.
  __device__ __forceinline__ void correct(const R (&d)[S], int count) {
#pragma unroll 1
    for (int t = 0; t < count; ++t) {
#pragma unroll
      for (int i = 0; i < S; ++i) {
        R row[S];
#pragma unroll
        for (int j = 0; j < S; ++j) row[j] = room.m[warp_of()][t][i][j][lane_of()];
        R& state = room.s[warp_of()][t][i][lane_of()];
        state = corrected(state, row, d);
        room.ends[warp_of()][i][lane_of()] = state;
      }
    }
  }

  __device__ __forceinline__ void emit(Carry& carry, typename Base::Tokens&, const time_scan::Token& t) {
    R x[Base::kGates];
    this->take_token(t.i, carry.s, x);
#pragma unroll
    for (int i = 0; i < S; ++i) carry.s[i] = room.s[warp_of()][t.i][i][lane_of()];
    this->put_token(t.i, carry.s[0]);
  }
  __device__ __forceinline__ Carry initial(int64_t row, int64_t) const { return this->state_of(row); }

 private:
  const FwdParams& p;
  Room<kCell, R>& room;
  R n_[S][S], worst_[S];  // the largest |M_t|, and error had the chunk begun without one
};

// [correct], [estimate]
// block    32 channels of one batch row, tile after tile
// warp     a chunk of a tile
// thread   one channel
// shared   gates, s_t and M_t of the tile, a lane's own; what the chunks do to a state
// bytes    x, h once
// limits   B D / 32 < 2^31 blocks
template <int kCell, typename R>
__global__ void __launch_bounds__(kTileWarps* kWarpSize, tile_of(sizeof(R)).newton_blocks)
    newton_kernel(const __grid_constant__ FwdParams p, const __grid_constant__ Cut cut, const int most_passes,
                  bool* failed) {
  constexpr int kTokens = kNewtonTokens<kCell, R>, S = CellOf<kCell, R>::kStates;
  static_assert(sizeof(Room<kCell, R>) == Room<kCell, R>::kBytes);
  auto& room = shared_memory<Room<kCell, R>>();
  const Place place(cut, p.channels);
  const Sequences sequences = sequences_of(p);
  const int warp = warp_of(), lane = lane_of();
  time_scan::Timeline<kTokens> time(sequences, p.reset, false, place.b);
  Iterate<kCell, R> chunk(p, place, room);

  uint32_t good = __ballot_sync(0xffffffffu, place.exists);  // channels
  int passes = 0;
  R estimate = R(0), error[S] = {};  // error: of `enters`
  State<R, S> enters = chunk.state_of(-1);
  int64_t tau = warp * kTokens;
  chunk.fetch(tau), time.fetch(tau);
#pragma unroll 1
  for (int64_t begin = 0; begin < sequences.length && good; begin += kTileWarps * kTokens) {
    auto tokens = chunk.take();
    const time_scan::Facts facts = time.take(tau);
    chunk.fetch(tau + kTileWarps * kTokens), time.fetch(tau + kTileWarps * kTokens);

    State<R, S> before;
    uint32_t active = good, settled = 0;
    R d[S] = {}, e[S] = {}, leaves[S] = {};
    R largest = R(0);
    int mine = 0;  // passes that corrected the channel
#pragma unroll 1
    for (int pass = 0;; ++pass) {
      const bool last = active == 0 || pass > most_passes;
      const bool guesses = pass == 0, moves = !last && (active >> lane & 1u);
#pragma unroll
      for (int i = 0; i < S; ++i) before.s[i] = warp == 0 ? enters.s[i] : room.ends[warp - 1][i][lane];
      chunk.linearize(time, facts, tau, before, guesses, moves);
      __syncthreads();
      chunk.fold(error, d, e, leaves);
      bool settles;
      largest = chunk.judge(e, before, facts.count, settles);
      const uint32_t vote = __ballot_sync(0xffffffffu, settles);
      if (lane == 0) room.votes[warp] = vote;
      __syncthreads();
      settled = 0xffffffffu;
#pragma unroll
      for (int w = 0; w < kTileWarps; ++w) settled &= room.votes[w];
      if (last) break;

      if (guesses) memset(d, 0, sizeof(d)), settled = 0;
      if (moves) chunk.correct(d, facts.count), mine = pass;
      active &= ~settled;
      __syncthreads();
    }
    passes = max(passes, mine);
    if (good >> lane & 1u) estimate = larger(largest, estimate);
    good &= settled;
#pragma unroll
    for (int i = 0; i < S; ++i) {
      error[i] = leaves[i];
      enters.s[i] = room.ends[kTileWarps - 1][i][lane];
    }
    time_scan::walk(chunk, time, facts, tau, tokens, before);
    chunk.store(tokens, tau);
    tau += kTileWarps * kTokens;
  }

  room.estimate[warp][lane] = estimate;
  __syncthreads();
  if (warp > 0 || !place.exists) return;
  for (int w = 1; w < kTileWarps; ++w) estimate = larger(room.estimate[w][lane], estimate);
  const bool fails = !(good >> lane & 1u);
  report(p, place, passes, static_cast<float>(estimate), fails);
  store(failed + place.chain * kWarpSize + lane, fails);
}

struct Instance {
  Cell cell;
  DType accumulator;
  void (*kernel)(FwdParams, Cut, int, bool*);
};
template <Cell kCell, typename R>
constexpr Instance kInstance = {kCell, kDType<R>, newton_kernel<static_cast<int>(kCell), R>};

constexpr Instance kInstances[] = {
    kInstance<Cell::kGru, float>,    kInstance<Cell::kGru, double>,    kInstance<Cell::kLstm, float>,
    kInstance<Cell::kLstm, double>,  kInstance<Cell::kSlstm, float>,   kInstance<Cell::kSlstm, double>,
    kInstance<Cell::kIndRnn, float>, kInstance<Cell::kIndRnn, double>, kInstance<Cell::kElman, float>,
    kInstance<Cell::kElman, double>,
};
static_assert(std::size(kInstances) == kNewtonKernels);

}  // namespace

void newton(const FwdParams& p, const FwdPlan& plan, Stream stream) {
  const Instance& instance = find_instance(kInstances, "elementwise_rnn_fwd", [&](const Instance& i) {
    return i.cell == p.cell && i.accumulator == p.accumulator;
  });
  bool* failed = static_cast<bool*>(p.workspace);
  launch({.name = "elementwise_rnn_newton",
          .grid = {plan.cut.blocks},
          .threads = plan.cut.threads,
          .smem_bytes = plan.smem_bytes,
          .stream = stream},
         instance.kernel, p, plan.cut, plan.sweeps, failed);
  serial(p, failed, stream);
}

}  // namespace seqkern::elementwise_rnn::cuda

// The forward's walks through time: a recurrence of common/time_scan.cuh that takes gates and leaves h and checkpoints,
// whatever it does to the state in between.
#pragma once

#include "elementwise_rnn/rnn.cuh"

namespace seqkern::elementwise_rnn::cuda {

// What a lane takes and leaves. The gates of a chunk lie in shared memory, where the loop over tokens finds them by a
// running index: the cell is in a kernel once, not once for every token of a chunk. A lane reads what it wrote itself.
template <int kCell, typename R,
          int kTokens_ = walk_tokens({CellOf<kCell, R>::kGates, CellOf<kCell, R>::kStates, sizeof(R)})>
class Channel {
 public:
  struct Tokens {};
  using Cell = CellOf<kCell, R>;
  using Real = R;
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates;
  static constexpr int kTokens = kTokens_;
  static_assert(kKept % kTokens == 0);
  struct Slots {
    R x[kTokens][kGates][kWarpSize];  // h in place of the first gate
  };

  // `stores`: whether the lane writes h, checkpoints and final states.
  __device__ __forceinline__ Channel(const FwdParams& params, const time_scan::Place& place, Slots& slots, bool stores)
      : p_(params), place_(place), slots_(&slots.x[0][0][time_scan::lane_of()]), stores_(stores && place.exists) {
    load_weights(w, p_, place_);
  }

  __device__ __forceinline__ void fetch(int64_t tau) {
    gates_.fetch(p_.x, p_.sequences, place_, tau);
    next_kept_ = static_cast<int>((p_.sequences.length - tau) % kKept);
  }
  __device__ __forceinline__ Tokens take() {
    gates_.decode(p_.x, p_.sequences, place_, [&](int i, int g, R given) {
      if (i == 0) ahead_[g] = given;
      slot(i, g) = given;
    });
    kept_ = next_kept_;
    return {};
  }

  __device__ __forceinline__ void gates_of(int i, R (&x)[kGates]) const {
#pragma unroll
    for (int g = 0; g < kGates; ++g) x[g] = slot(i, g);
  }
  // Every token is taken, put or padded, one after the other. The gates of the next one are loaded meanwhile; `before`
  // is the state that enters.
  __device__ __forceinline__ void take_token(int i, const R (&before)[kStates], R (&x)[kGates]) {
    next_token(i, x);
    if (i != kept_) return;
#pragma unroll
    for (int k = 0; k < kStates; ++k) checkpoint_[k] = before[k];
  }
  __device__ __forceinline__ void put_token(int i, R h) { slot(i, 0) = h; }
  __device__ __forceinline__ void pad(Tokens&, int i) {
    R x[kGates];
    next_token(i, x), put_token(i, R(0));
  }

  __device__ __forceinline__ void store(const Tokens&, int64_t tau) const {
    const Sequences& s = p_.sequences;
    R h[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) h[i] = slot(i, 0);
    const Data& out = p_.h;
    time_scan::store_tokens(
        time_scan::LineOf<ArrayFor<R>>({{out.data, out.dtype}}, place_.b * out.stride.b + place_.channel, out.stride.l,
                                       s, stores_),
        tau, h);
    if (!p_.checkpoints || !stores_ || kept_ >= kTokens || tau + kept_ >= s.length) return;
#pragma unroll
    for (int k = 0; k < kStates; ++k)
      seqkern::store(p_.checkpoints, checkpoint_at(p_, place_, k, (s.length - tau - kept_) / kKept - 1),
                     checkpoint_[k]);
  }

  // The state that enters a sequence.
  __device__ __forceinline__ State<R, kStates> state_of(int64_t row) const {
    State<R, kStates> state;
    if (row < 0 || !place_.exists)
      Cell::empty(state.s);
    else
      load_state(state, p_.initial_state, p_, place_, row);
    return state;
  }
  __device__ __forceinline__ void leave(const State<R, kStates>& state, int64_t row) const {
    if (stores_) store_state(state, p_.final_state, p_, place_, row);
  }
  __device__ __forceinline__ bool reads_initial() const { return static_cast<bool>(p_.initial_state); }
  __device__ __forceinline__ bool reads_final() const { return static_cast<bool>(p_.final_state); }

  R w[Cell::kWeights];

 private:
  __device__ __forceinline__ void next_token(int i, R (&x)[kGates]) {
#pragma unroll
    for (int g = 0; g < kGates; ++g) x[g] = ahead_[g], ahead_[g] = slot((i + 1) & (kTokens - 1), g);
  }
  __device__ __forceinline__ R& slot(int i, int g) const { return slots_[(i * kGates + g) * kWarpSize]; }

  const FwdParams& p_;
  const time_scan::Place& place_;
  R* slots_;  // of the lane
  const bool stores_;
  Gates<R, kGates, kTokens> gates_;
  R ahead_[kGates];
  R checkpoint_[kStates];
  int kept_, next_kept_;  // token of the chunk before which the state is kept; kTokens or more: none
};

// What became of a channel, into the statistics.
__device__ __forceinline__ void report(const FwdParams& p, const time_scan::Place& place, int sweeps, float estimate,
                                       bool repaired) {
  const int64_t i = place.b * p.channels + place.channel;
  if (p.stats.sweeps) store(p.stats.sweeps + i, static_cast<int32_t>(sweeps));
  if (p.stats.estimate) store(p.stats.estimate + i, estimate);
  if (p.stats.repaired) store(p.stats.repaired + i, repaired);
}

}  // namespace seqkern::elementwise_rnn::cuda

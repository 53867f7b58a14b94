// Tokens in scans over time (time_scan.cuh): which of them a thread has, how they come from memory and go there, and
// what is known of them.
#pragma once

#include "common/array.cuh"
#include "common/complex.cuh"
#include "common/grid.cuh"
#include "common/load.cuh"
#include "common/sequences.cuh"
#include "common/time_tile.h"

namespace seqkern::time_scan {

__device__ __forceinline__ int lane_of() {
  return threadIdx.x % kWarpSize;
}
__device__ __forceinline__ int warp_of() {
  return threadIdx.x / kWarpSize;
}

__device__ __forceinline__ Sequences mirrored(Sequences s) {
  s.reverse = !s.reverse;
  return s;
}

// Where a thread is.
struct Place {
  int64_t chain, tile;
  int64_t b, channel;
  bool chain_exists, exists;

  // On the serial path a warp is a chain; else a block is a tile of one, tiles of small index first: a block waits
  // only for blocks that started before it.
  __device__ __forceinline__ Place(const Cut& cut, int64_t channels) {
    if (cut.path == Path::kSerial) {
      chain = static_cast<int64_t>(blockIdx.x) * kSerialWarps + warp_of(), tile = 0;
    } else {
      const auto [later, of_tile] = divide(blockIdx.x, cut.chains);
      chain = of_tile, tile = later;
    }
    const auto [row, block] = divide(chain, cut.chains_of_row);
    b = row, channel = block * kChannels + lane_of();
    chain_exists = chain < cut.chains, exists = chain_exists && channel < channels;
  }
};

// Tokens of one channel in memory: numbers S, that of token tau at `first + tau step`, counted in S.

template <typename A>  // Array, or ArrayFor<R>
struct LineOf {
  A array;
  int64_t first = 0, step = 0;
  int64_t length = 0;  // tokens
  bool exists = false;

  LineOf() = default;
  // `channel`: where token t = 0 in memory lies; `l`: from one token to the next in memory.
  __device__ __forceinline__ LineOf(const A& array_, int64_t channel, int64_t l, const Sequences& s, bool exists)
      : array(array_),
        first(s.reverse ? channel + (s.length - 1) * l : channel),
        step(s.reverse ? -l : l),
        length(s.length),
        exists(exists && array_) {}

  // Of the `tokens` from tau on those that are there; a lane without a channel has none.
  __device__ __forceinline__ int count(int64_t tau, int tokens) const {
    return exists ? static_cast<int>(clamp(length - tau, 0, tokens)) : 0;
  }
};
using Line = LineOf<Array>;

// Tokens on the way: as they lie in memory, so that nothing waits for them until they are decoded. (Types that
// registers of R do not hold are converted at once.)
template <typename S, int kTokens>
struct Fetched {
  static constexpr int kParts = sizeof(S) / sizeof(Real<S>);
  template <typename T>
  static constexpr bool kRaw = sizeof(T) == sizeof(Real<S>) || (sizeof(T) == 2 && sizeof(Real<S>) == 4);
  struct Words {
    uint32_t word[sizeof(S) / 4];
  };
  Words token[kTokens];

  // Tokens [tau, tau + kTokens); where there is none, zero. Where all tokens are one number, it is loaded once.
  template <typename A>
  __device__ __forceinline__ void fetch(const LineOf<A>& line, int64_t tau) {
    const int count = line.step == 0 ? line.count(tau, 1) : line.count(tau, kTokens);
    const int64_t step = line.step * kParts;
    visit(line.array, [&]<typename T>(const T* data) {
      const T* from = data + (line.first + tau * line.step) * kParts;
      if (count == kTokens) {  // as always but at the end of a row: no predicates, addresses one after the other
#pragma unroll
        for (int i = 0; i < kTokens; ++i, from += step) fetch(token[i], from);
      } else {
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
          token[i] = {};
          if (i >= count) continue;
          fetch(token[i], from), from += step;
        }
      }
    });
  }

  // f(i, number) for all tokens.
  template <typename A, typename F>
  __device__ __forceinline__ void decode(const LineOf<A>& line, F&& f) const {
    visit(line.array, [&]<typename T>(const T*) {
      const int64_t step = line.step;
      S first{};
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        S s;
        if constexpr (kRaw<T>) {
          Vector<T, kParts> v;
          memcpy(&v, &token[i], sizeof(v));
          const auto r = converted(v);
          memcpy(static_cast<void*>(&s), &r, sizeof(s));
        } else {
          memcpy(static_cast<void*>(&s), &token[i], sizeof(s));
        }
        if (i == 0) first = s;
        f(i, step == 0 ? first : s);
      }
    });
  }

 private:
  template <typename T>
  __device__ __forceinline__ static void fetch(Words& token, const T* from) {
    const auto v = load<kParts>(from);
    if constexpr (kRaw<T>) {
      memcpy(&token, &v, sizeof(v));
    } else {
      const auto r = converted(v);
      memcpy(&token, &r, sizeof(r));
    }
  }

  template <typename T>
  __device__ __forceinline__ static Vector<Real<S>, kParts> converted(const Vector<T, kParts>& v) {
    Vector<Real<S>, kParts> r;
#pragma unroll
    for (int part = 0; part < kParts; ++part) r[part] = to<Real<S>>(v[part]);
    return r;
  }
};

// Number i of an array.
template <typename S>
__device__ __forceinline__ S load_number(const Array& array, int64_t i) {
  using R = Real<S>;
  if constexpr (kIsComplex<S>)
    return {load<R>(array, 2 * i), load<R>(array, 2 * i + 1)};
  else
    return load<R>(array, i);
}
template <typename S>
__device__ __forceinline__ void store_number(const Array& array, int64_t i, S value) {
  if constexpr (kIsComplex<S>)
    store(array, 2 * i, value.re), store(array, 2 * i + 1, value.im);
  else
    store(array, i, value);
}

template <typename A, typename S, int kTokens>
__device__ __forceinline__ void store_tokens(const LineOf<A>& line, int64_t tau, const S (&value)[kTokens]) {
  constexpr int kParts = sizeof(S) / sizeof(Real<S>);
  const int count = line.count(tau, kTokens);
  const int64_t step = line.step * kParts;
  visit(line.array, [&]<typename T>(T* data) {
    T* out = data + (line.first + tau * line.step) * kParts;
    const auto store_one = [&](int i) {
      Real<S> part[kParts];
      memcpy(part, &value[i], sizeof(S));
      Vector<T, kParts> v;
#pragma unroll
      for (int k = 0; k < kParts; ++k) v[k] = to<T>(part[k]);
      store(out, v);
      out += step;
    };
    if (count == kTokens) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) store_one(i);
    } else {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        if (i < count) store_one(i);
      }
    }
  });
}

// What is known of the tokens of a chunk, the same in all lanes: bit i for token i.
struct Facts {
  uint32_t fresh;    // what comes before is of no concern: the first of a sequence, padding, or cut off by a reset
  uint32_t first;    // of these the first of a sequence: an initial state may enter
  uint32_t reset;    // reset is set
  uint32_t padding;  // no sequence's
  uint32_t last;     // the last of a sequence
  int count;         // tokens that exist
  int64_t state;     // lane i: row of the states of token i's sequence

  template <int kTokens>
  __device__ __forceinline__ bool plain() const {
    return (fresh | reset | last) == 0 && count == kTokens;
  }
};

// One of them, for emit.
struct Token {
  int i;
  bool reset = false, last = false;
  int64_t row = -1;  // of the states that follow, where it is the last; -1: none
};

// Finds the facts. By all lanes of a warp, of which lane i looks at token i.
template <int kTokens>
class Timeline {
  static_assert(kTokens <= kWarpSize);

 public:
  // `reset` (B, L) or nullptr. `adjoint`: `s` is mirrored.
  __device__ __forceinline__ Timeline(const Sequences& s, const bool* reset, bool adjoint, int64_t b)
      : s_(s), reset_(reset ? reset + b * s.length : nullptr), adjoint_(adjoint), b_(b) {}

  // Starts the loads for tokens [first, first + kTokens); `first` never goes back.
  __device__ __forceinline__ void fetch(int64_t first) {
    const int64_t tau = first + lane_of();
    if (lane_of() >= count(first)) return;
    if (s_.cu_seqlens) {
      begins_ = false;
      if (tau >= end_) {
        const Span span = packed_span_at(s_, tau);
        begins_ = tau == span.begin, end_ = span.end, state_ = span.padding ? -1 : span.state;
      }
    } else if (s_.seq_idx) {
      id_ = sequence_id(s_, b_, tau);
      before_ = tau > 0 ? sequence_id(s_, b_, tau - 1) : -2;
      after_ = tau + 1 < s_.length ? sequence_id(s_, b_, tau + 1) : -2;
    }
    if (reset_) {
      reset_here_ = load(reset_ + memory_place(s_, tau));
      reset_before_ = adjoint_ && tau > 0 && load(reset_ + memory_place(s_, tau - 1));
    }
  }

  // The facts of what was fetched last.
  __device__ __forceinline__ Facts take(int64_t first) const {
    const int64_t tau = first + lane_of();
    const bool exists = lane_of() < count(first);
    bool begin = tau == 0, end = tau == s_.length - 1, padding = false;
    int64_t state = b_;
    if (s_.cu_seqlens) {
      begin = begins_, end = tau + 1 == end_, padding = state_ < 0, state = state_;
    } else if (s_.seq_idx) {
      begin = before_ != id_, end = after_ != id_, padding = id_ < 0;
    }
    const auto vote = [&](bool fact) { return __ballot_sync(0xffffffffu, exists && fact); };
    Facts f;
    f.first = vote(begin && !padding), f.last = vote(end && !padding), f.padding = vote(padding);
    f.reset = reset_ ? vote(reset_here_ && !padding) : 0;
    const uint32_t cut = adjoint_ && reset_ ? vote(reset_before_) : f.reset;
    f.fresh = f.first | f.padding | cut;
    if (!adjoint_) f.first &= ~f.reset;  // an initial state is discarded
    f.count = count(first), f.state = state;
    return f;
  }

  // Row of the initial state that enters at token i of the chunk of `f`, which begins at tau, -1: none; likewise of the
  // final state that follows it.
  __device__ __forceinline__ int64_t initial_row(const Facts& f, int64_t tau, int i) const {
    return f.first >> i & 1u ? seqkern::initial_row(s_, b_, span(f, tau, i)) : -1;
  }
  __device__ __forceinline__ int64_t final_row(const Facts& f, int64_t tau, int i) const {
    return f.last >> i & 1u ? seqkern::final_row(s_, b_, span(f, tau, i)) : -1;
  }

 private:
  __device__ __forceinline__ int count(int64_t first) const {
    return static_cast<int>(clamp(s_.length - first, 0, kTokens));
  }
  __device__ __forceinline__ static Span span(const Facts& f, int64_t tau, int i) {
    return {tau + i, tau + i + 1, __shfl_sync(0xffffffffu, f.state, i), false};
  }

  const Sequences& s_;
  const bool* reset_;
  bool adjoint_;
  int64_t b_;
  // Of the lane's token, with cu_seqlens: the end of its sequence, and the row of its states, -1: padding.
  int64_t end_ = 0, state_ = 0;
  bool begins_ = false;
  int32_t id_ = 0, before_ = 0, after_ = 0;
  bool reset_here_ = false, reset_before_ = false;
};

}  // namespace seqkern::time_scan

// What forward and backward share on the device: the lanes of a warp, tiles of tokens in shared memory, and the
// recurrence. Everything counts in processing time (common/sequences.cuh); `tau` is a token of the row, `t` one of the
// tile.
#pragma once

#include "common/array.cuh"
#include "common/complex.cuh"
#include "common/grid.cuh"
#include "common/load.cuh"
#include "common/math.cuh"
#include "common/reduce.cuh"
#include "common/sequences.cuh"
#include "selective_scan/params.h"
#include "selective_scan/warp_tile.h"

namespace seqkern::selective_scan::cuda {

template <typename R, bool kComplex>
using Scalar = std::conditional_t<kComplex, Complex<R>, R>;

// Where a block is: its batch row and segment, its channels, and the tiles of its segment.
struct BlockPlace {
  int64_t b, segment;
  int64_t channel;   // of its first warp
  int64_t channels;  // from there to the end of the piece
  int64_t first_tile, last_tile;

  __device__ __forceinline__ BlockPlace(const Inputs& in, const Cut& cut) {
    const auto [rest, block] = divide(blockIdx.x, cut.blocks);
    const auto [row, piece] = divide(rest, in.channels / cut.piece);
    const auto [batch, seg] = divide(row, cut.segments);
    b = batch, segment = seg;
    const int64_t offset = block * cut.warps * kWarpChannels;
    channel = piece * cut.piece + offset, channels = cut.piece - offset;
    first_tile = seg * cut.tiles, last_tile = min(first_tile + cut.tiles, num_chunks(in.sequences));
  }
};

// The channels of a warp: `count` of them exist (the others are computed on zeros and never stored).
struct WarpPlace {
  int64_t b, channel;
  int count;

  __device__ __forceinline__ WarpPlace(const BlockPlace& block, int warp = threadIdx.x / kWarpSize)
      : b(block.b),
        channel(block.channel + warp * kWarpChannels),
        count(static_cast<int>(clamp(block.channels - warp * kWarpChannels, 0, kWarpChannels))) {}
};

// The lanes of a warp over channels and states, and what a lane holds. S is the scalar of states. kSharing warps may
// share their channels: each then has a part of them.
template <typename S, int kStateLanes, int kSharing = 1>
struct Lane {
  using R = Real<S>;
  static constexpr int kParts = sizeof(S) / sizeof(R);
  static constexpr int kChannels = kStateLanes / kSharing;  // of a lane
  static constexpr int kStates = 16 / sizeof(S);            // of a lane, for each channel
  static constexpr int kSlice = kStateLanes * kStates;      // states of a warp
  using States = S[kChannels][kStates];

  int lane = threadIdx.x % kWarpSize;
  int channel = (threadIdx.x / kWarpSize % kSharing * kWarpSize + lane) / kStateLanes * kChannels;  // the first one
  int state = lane % kStateLanes * kStates;  // of the slice's states, the first one

  // From or to row `row` of (rows, D, N) elements of S in any dtype; what does not exist becomes zero. A row of -1:
  // zeros.
  __device__ __forceinline__ void load_row(States& h, const Inputs& in, const WarpPlace& warp, int64_t slice,
                                           const Array& array, int64_t row) const {
    fill(h, R(0));
    if (row < 0) return;
    visit(array, [&]<typename T>(const T* data) {
      for_each_in_row(data + row_offset(in, warp, slice, row), in, warp, slice,
                      [&](int c, int n, int part, const T* from) { part_of(h[c][n], part) = to<R>(load(from)); });
    });
  }
  __device__ __forceinline__ void store_row(const States& h, const Inputs& in, const WarpPlace& warp, int64_t slice,
                                            const Array& array, int64_t row) const {
    visit(array, [&]<typename T>(T* data) {
      for_each_in_row(data + row_offset(in, warp, slice, row), in, warp, slice,
                      [&](int c, int n, int part, T* out) { store(out, to<T>(part_of(h[c][n], part))); });
    });
  }

  // The same for row `row` of accumulators (rows, N, parts, D): checkpoints, and states in the workspace.
  __device__ __forceinline__ void load_state(States& h, const Inputs& in, const Cut& cut, const WarpPlace& warp,
                                             int64_t slice, const void* array, int64_t row) const {
    fill(h, R(0));
    for_each_in_state(static_cast<const R*>(array) + state_offset(in, warp, slice, row), in, warp, slice,
                      [&](int n, int part, const R* from) {
                        Vector<R, kChannels> v{};
                        if (cut.vectorized) {
                          v = load<kChannels>(from);
                        } else {
#pragma unroll
                          for (int c = 0; c < kChannels; ++c) {
                            if (channel + c < warp.count) v[c] = load(from + c);
                          }
                        }
#pragma unroll
                        for (int c = 0; c < kChannels; ++c) part_of(h[c][n], part) = v[c];
                      });
  }
  __device__ __forceinline__ void store_state(const States& h, const Inputs& in, const Cut& cut, const WarpPlace& warp,
                                              int64_t slice, void* array, int64_t row) const {
    for_each_in_state(static_cast<R*>(array) + state_offset(in, warp, slice, row), in, warp, slice,
                      [&](int n, int part, R* out) {
                        Vector<R, kChannels> v;
#pragma unroll
                        for (int c = 0; c < kChannels; ++c) v[c] = part_of(h[c][n], part);
                        if (cut.vectorized) return store(out, v);
#pragma unroll
                        for (int c = 0; c < kChannels; ++c) {
                          if (channel + c < warp.count) store(out + c, v[c]);
                        }
                      });
  }

  // A in the form that decay() takes.
  __device__ __forceinline__ void load_A(States& A, const Inputs& in, const WarpPlace& warp, int64_t slice) const {
    load_row(A, in, warp, slice, in.A, 0);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int n = 0; n < kStates; ++n) A[c][n] = exp_rate(A[c][n]);
    }
  }

  __device__ __forceinline__ static void fill(States& h, R value) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int n = 0; n < kStates; ++n) h[c][n] = S(value);
    }
  }

 private:
  __device__ __forceinline__ static const R& part_of(const S& s, int part) {
    return reinterpret_cast<const R*>(&s)[part];
  }
  __device__ __forceinline__ static R& part_of(S& s, int part) { return reinterpret_cast<R*>(&s)[part]; }

  // The lane's first element of a row.
  __device__ __forceinline__ int64_t row_offset(const Inputs& in, const WarpPlace& warp, int64_t slice,
                                                int64_t row) const {
    return ((row * in.channels + warp.channel + channel) * in.states + slice * kSlice + state) * kParts;
  }
  __device__ __forceinline__ int64_t state_offset(const Inputs& in, const WarpPlace& warp, int64_t slice,
                                                  int64_t row) const {
    return (row * in.states + slice * kSlice + state) * kParts * in.channels + warp.channel + channel;
  }

  // How many of the lane's states exist; may be negative.
  __device__ __forceinline__ static int states_left(const Inputs& in, int64_t slice, int state) {
    return static_cast<int>(min(in.states - slice * kSlice, int64_t{kSlice})) - state;
  }

  // f(c, n, part, element) for all that exist; f(n, part, element of the first channel) if the first channel exists.
  // Pointers step along, so that no products of strides are kept in registers.
  template <typename T, typename F>
  __device__ __forceinline__ void for_each_in_row(T* element, const Inputs& in, const WarpPlace& warp, int64_t slice,
                                                  F&& f) const {
    const int states = states_left(in, slice, state);
#pragma unroll
    for (int c = 0; c < kChannels; ++c, element += in.states * kParts) {
#pragma unroll
      for (int i = 0; i < kStates * kParts; ++i) {
        if (channel + c < warp.count && i / kParts < states) f(c, i / kParts, i % kParts, element + i);
      }
    }
  }
  template <typename T, typename F>
  __device__ __forceinline__ void for_each_in_state(T* element, const Inputs& in, const WarpPlace& warp, int64_t slice,
                                                    F&& f) const {
    const int states = channel < warp.count ? states_left(in, slice, state) : 0;
#pragma unroll
    for (int i = 0; i < kStates * kParts; ++i, element += in.channels) {
      if (i / kParts < states) f(i / kParts, i % kParts, element);
    }
  }
};

// a_t [decay], A from load_A.
template <bool kTwoExp = false, typename R, typename S>
__device__ __forceinline__ S decay(R delta, S A, bool two_exp = kTwoExp) {
  const S a = exp_of(delta, A);
  return two_exp ? fma(R(2), a, S(R(-1))) : a;
}

// Tokens [tau, tau + count) of a row, count <= kTokens; or of these those from `first` on.
struct TimeTile {
  int64_t tau;
  int first = 0, count;
  bool reverse;
  int64_t lowest;  // token in memory of the tile's lowest address; negative if the tile of a reversed row is not whole

  __device__ __forceinline__ TimeTile(const Sequences& s, int64_t tile)
      : tau(tile * kTokens),
        count(static_cast<int>(min(s.length - tau, int64_t{kTokens}))),
        reverse(s.reverse),
        lowest(memory_place(s, tau, kTokens)) {}

  __device__ __forceinline__ bool has(int t) const { return first <= t && t < count; }

  // The token at place `m` from the lowest address.
  __device__ __forceinline__ int token(int m) const { return reverse ? kTokens - 1 - m : m; }
  // From its place in a tile of shared memory to that of the token after it in memory, where both lie in the same four.
  __device__ __forceinline__ int step() const { return reverse ? -kWarpChannels : kWarpChannels; }
};

// Place of a token and channel in a tile of shared memory. Four neighbouring channels stay neighbours. They are moved
// about, in another way for every four tokens from a multiple of four on, so that stores of neighbouring tokens fall
// into different banks; within the four tokens a channel's places are kWarpChannels apart.
__device__ __forceinline__ constexpr int place(int t, int channel) {
  return t * kWarpChannels + (channel ^ (t & 28));
}
template <typename R>
struct alignas(16) DataTile {
  R value[kTokens * kWarpChannels];

  template <int kCount>
  __device__ __forceinline__ Vector<R, kCount> at(int t, int channel) const {
    return *reinterpret_cast<const Vector<R, kCount>*>(value + place(t, channel));
  }
};

// f(t, place) for all tokens of a channel of a tile of R.
template <typename R, typename F>
__device__ __forceinline__ void for_each_in_column(int channel, F&& f) {
  [[maybe_unused]] constexpr int kAtOnce = sizeof(R) == 8 ? 1 : 4;
#pragma unroll 1
  for (int first = 0; first < kTokens; first += 4) {
#pragma unroll kAtOnce
    for (int i = 0; i < 4; ++i) f(first + i, place(first, channel) + i * kWarpChannels);
  }
}

// Walks through the elements of a (B, D, L) tensor that a warp has in a tile, 16 bytes at a time: f(elements, slow,
// fast, whole), for `fast` and the places after it. `fast` counts along the contiguous dimension, time by place from
// the lowest address or channels. Where not `whole`, elements are not aligned and some may not exist.
template <int kUnroll, typename T, typename F>
__device__ __forceinline__ void for_each_in_tile(T* data, const Strides& stride, const WarpPlace& warp,
                                                 const TimeTile& time, F&& f) {
  constexpr int kCount = kVectorCount<T>, kVectors = kWarpChannels / kCount;
  [[maybe_unused]] constexpr int kAtOnce = sizeof(T) == 8 ? 1 : kUnroll;  // fp64 is not worth the code
  const int lane = threadIdx.x % kWarpSize;
  const int64_t step = stride.l == 1 ? stride.d : stride.l;
  T* base = data + warp.b * stride.b + warp.channel * stride.d + time.lowest * stride.l;
  const bool aligned = reinterpret_cast<uintptr_t>(base) % 16 == 0 && step % kCount == 0;
  const bool whole = aligned && time.count - time.first == kTokens && warp.count == kWarpChannels;
#pragma unroll kAtOnce
  for (int i = 0; i < kVectors; ++i) {
    const int slow = (i * kWarpSize + lane) / kVectors, fast = lane % kVectors * kCount;
    f(base + slow * step + fast, slow, fast, whole);
  }
}

// A warp's elements of a tensor into shared memory, zeros where there are none.
template <typename R>
__device__ __forceinline__ void load_tile(DataTile<R>& tile, const Data& x, const WarpPlace& warp,
                                          const TimeTile& time) {
  const bool along_time = x.time_contiguous();
  visit(Array{x.data, x.dtype}, [&]<typename T>(const T* data) {
    constexpr int kCount = kVectorCount<T>;
    constexpr int kStored = kCount < kVectorCount<R> ? kCount : kVectorCount<R>, kFour = kCount < 4 ? kCount : 4;
    for_each_in_tile<4>(data, x.stride, warp, time, [&](const T* from, int slow, int fast, bool whole) {
      Vector<T, kCount> v;
      if (whole) {
        v = load<kCount>(from);
      } else {
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          const int t = time.token(along_time ? fast + e : slow), channel = along_time ? slow : fast + e;
          v[e] = time.has(t) && channel < warp.count ? load(from + e) : static_cast<T>(0.0f);
        }
      }
      if (along_time) {
#pragma unroll
        for (int e = 0; e < kCount; e += kFour) {
          R* first = tile.value + place(time.token(fast + e), slow);
#pragma unroll
          for (int i = 0; i < kFour; ++i) first[i * time.step()] = to<R>(v[e + i]);
        }
      } else {
#pragma unroll
        for (int e = 0; e < kCount; e += kStored) {
          Vector<R, kStored> part;
#pragma unroll
          for (int i = 0; i < kStored; ++i) part[i] = to<R>(v[e + i]);
          store(tile.value + place(time.token(slow), fast + e), part);
        }
      }
    });
  });
}

// The reverse. Nothing waits for stores: fewer of them need to be under way.
template <typename R>
__device__ __forceinline__ void store_tile(const DataTile<R>& tile, const Data& x, const WarpPlace& warp,
                                           const TimeTile& time) {
  const bool along_time = x.time_contiguous();
  visit(Array{x.data, x.dtype}, [&]<typename T>(T* data) {
    constexpr int kCount = kVectorCount<T>;
    constexpr int kLoaded = kCount < kVectorCount<R> ? kCount : kVectorCount<R>, kFour = kCount < 4 ? kCount : 4;
    for_each_in_tile<2>(data, x.stride, warp, time, [&](T* out, int slow, int fast, bool whole) {
      Vector<T, kCount> v;
      if (along_time) {
#pragma unroll
        for (int e = 0; e < kCount; e += kFour) {
          const R* first = tile.value + place(time.token(fast + e), slow);
#pragma unroll
          for (int i = 0; i < kFour; ++i) v[e + i] = to<T>(first[i * time.step()]);
        }
      } else {
#pragma unroll
        for (int e = 0; e < kCount; e += kLoaded) {
          const auto part = load<kLoaded>(tile.value + place(time.token(slow), fast + e));
#pragma unroll
          for (int i = 0; i < kLoaded; ++i) v[e + i] = to<T>(part[i]);
        }
      }
      if (whole) return store(out, v);
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const int t = time.token(along_time ? fast + e : slow), channel = along_time ? slow : fast + e;
        if (time.has(t) && channel < warp.count) store(out + e, v[e]);
      }
    });
  });
}

// delta' [delta] in place of delta, zero from the end of the row on: such tokens leave states as they are. A lane takes
// one channel.
template <typename R>
__device__ __forceinline__ void apply_softplus(DataTile<R>& tile, const Inputs& in, const WarpPlace& warp,
                                               const TimeTile& time) {
  const int lane = threadIdx.x % kWarpSize;
  const R bias = in.delta_bias && lane < warp.count ? load<R>(in.delta_bias, warp.channel + lane) : R(0);
  const auto apply = [&](auto f) {
    for_each_in_column<R>(lane, [&](int t, int at) {
      const R delta = f(tile.value[at] + bias);
      tile.value[at] = time.has(t) && lane < warp.count ? delta : R(0);
    });
  };
  in.softplus ? apply([](R x) { return softplus(x); }) : apply([](R x) { return x; });
}

// B or C of a slice of states for the tokens of a tile, which the block shares; zero where there is no state or token.
template <typename S, int kSlice>
struct ProjectionTile {
  static constexpr int kRow = kSlice + 16 / sizeof(S);  // padded against bank conflicts
  alignas(16) S value[kTokens][kRow];

  // By all threads of the block. `channel` is any of the piece.
  __device__ __forceinline__ void load_from(const Projection& x, const Inputs& in, int64_t b, int64_t channel,
                                            int64_t slice, const TimeTile& time) {
    using R = Real<S>;
    constexpr int kParts = sizeof(S) / sizeof(R);
    const int64_t group = channel / (in.channels / x.groups);
    const int64_t first = b * x.b + group * x.g + slice * kSlice * x.n + time.lowest * x.l;
    const int states = static_cast<int>(min(in.states - slice * kSlice, int64_t{kSlice}));
    // Threads lie along what is contiguous, token by place `m` from the lowest address or state; all step along the
    // rest.
    const bool along_time = x.l <= x.n || x.l <= 2;
    const int width = along_time ? kTokens : kSlice;
    const int fast = threadIdx.x % width, step = blockDim.x / width;
    int slow = threadIdx.x / width;
    visit(Array{x.data, x.dtype}, [&]<typename T>(const T* data) {
      constexpr int kAtOnce = 4;  // loads in flight
      const T* from = data + first + (along_time ? slow : fast) * x.n + (along_time ? fast : slow) * x.l;
      for (; slow * width < kTokens * kSlice; slow += kAtOnce * step) {
        T parts[kAtOnce][kParts];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k, from += step * (along_time ? x.n : x.l)) {
          const int row = slow + k * step, t = time.token(along_time ? fast : row), n = along_time ? row : fast;
          const bool exists = time.has(t) && n < states;
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            parts[k][part] = exists ? load(from + part * x.im) : static_cast<T>(0.0f);
          }
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int row = slow + k * step, t = time.token(along_time ? fast : row), n = along_time ? row : fast;
          if (row * width >= kTokens * kSlice) continue;
          if constexpr (kIsComplex<S>)
            value[t][n] = {to<R>(parts[k][0]), to<R>(parts[k][1])};
          else
            value[t][n] = to<R>(parts[k][0]);
        }
      }
    });
  }

  template <int kCount>
  __device__ __forceinline__ Vector<S, kCount> at(int t, int n) const {
    return *reinterpret_cast<const Vector<S, kCount>*>(&value[t][n]);
  }
};

// A constant B or C in a tile whose rows are the warp's channels instead of tokens. By all threads of the block.
template <typename S, int kSlice>
__device__ __forceinline__ void load_constant(ProjectionTile<S, kSlice>& tile, const Projection& x, const Inputs& in,
                                              const BlockPlace& block, int64_t slice) {
  using R = Real<S>;
  visit(Array{x.data, x.dtype}, [&](const auto* data) {
    for (int i = threadIdx.x; i < kWarpChannels * kSlice; i += blockDim.x) {
      const int c = i / kSlice, n = i % kSlice;
      const int64_t s = slice * kSlice + n;
      S v = S(R(0));
      if (c < block.channels && s < in.states) {
        const int64_t at = (block.channel + c) * in.states + s;
        if constexpr (kIsComplex<S>)
          v = {to<R>(load(data + 2 * at)), to<R>(load(data + 2 * at + 1))};
        else
          v = to<R>(load(data + at));
      }
      tile.value[c][n] = v;
    }
  });
}

// Where sequences begin and end among the tokens of a tile: bit t for token t, the same in all lanes.
struct Marks {
  uint32_t begins;   // token t is the first of a sequence, or of padding
  uint32_t ends;     // the last of a sequence
  uint32_t padding;  // no sequence's
  int64_t row;       // lane t: row of the states of token t's sequence

  // By all lanes of a warp.
  __device__ __forceinline__ Marks(const Sequences& s, int64_t b, const TimeTile& time) {
    const int t = threadIdx.x % kWarpSize;
    const int64_t tau = time.tau + t, last = s.length - 1;
    bool begin = tau == 0, end = tau == last, pad = tau > last;
    row = b;
    if (s.cu_seqlens && !pad) {
      const Span span = packed_span_at(s, tau);
      begin = tau == span.begin, end = tau + 1 == span.end && !span.padding, pad = span.padding, row = span.state;
    } else if (s.seq_idx && !pad) {
      const int32_t id = sequence_id(s, b, tau);
      pad = id < 0;
      begin = begin || sequence_id(s, b, tau - 1) != id;
      end = !pad && (end || sequence_id(s, b, tau + 1) != id);
    }
    begins = __ballot_sync(0xffffffffu, begin);
    ends = __ballot_sync(0xffffffffu, end);
    padding = __ballot_sync(0xffffffffu, pad);
  }

  // Rows of the state that enters the sequence of token t, which it begins, or that follows it, which it ends; -1:
  // none.
  __device__ __forceinline__ int64_t initial_row(const Sequences& s, int64_t b, const TimeTile& time, int t) const {
    const Span span{time.tau + t, time.tau + t + 1, __shfl_sync(0xffffffffu, row, t), (padding >> t & 1u) != 0};
    return seqkern::initial_row(s, b, span);
  }
  __device__ __forceinline__ int64_t final_row(const Sequences& s, int64_t b, const TimeTile& time, int t) const {
    const Span span{time.tau + t, time.tau + t + 1, __shfl_sync(0xffffffffu, row, t), (padding >> t & 1u) != 0};
    return seqkern::final_row(s, b, span);
  }

  // The first token of the tile that lies in one piece with token t.
  __device__ __forceinline__ int piece_begin(int t) const {
    const uint32_t earlier = begins << (31 - t) >> (31 - t);
    return earlier ? 31 - __clz(static_cast<int>(earlier)) : 0;
  }

  // The end, within the tile, of the piece that token t lies in: the next token that begins something, or `count`.
  __device__ __forceinline__ int piece_end(int t, int count) const {
    const uint32_t later = t < 31 ? begins >> (t + 1) << (t + 1) : 0;
    return later ? min(__ffs(static_cast<int>(later)) - 1, count) : count;
  }
};

// What segments do to a state that enters them: it leaves as decay h + added. From what is added and the
// decays, NaN where nothing of h is left, accumulators (B, segments, N, parts, D) at two offsets of the workspace, to
// the states that enter segments, in place of what is added. `last_first`: from the last segment on, for gradients.
void carry_over_segments(const Inputs& in, const Cut& cut, void* workspace, int64_t states, int64_t decays,
                         bool last_first, Stream stream);

// Of rows whose sequence has no tokens: `to` (sequences.count, D, N, parts) becomes `from`, or zero where that is
// absent.
void pass_states(const Inputs& in, const Array& from, const Array& to, Stream stream);

}  // namespace seqkern::selective_scan::cuda

// What forward and backward share on the device: the lanes of a warp, tiles of B and C in shared memory, and the
// recurrence. Everything counts in processing time (common/sequences.cuh); `tau` is a token of the row, `t` one of the
// tile.
#pragma once

#include "common/complex.cuh"
#include "common/math.cuh"
#include "common/reduce.cuh"
#include "selective_scan/data_tile.cuh"

namespace seqkern::selective_scan::cuda {

template <typename R, bool kComplex>
using Scalar = std::conditional_t<kComplex, Complex<R>, R>;

// The lanes of a warp over channels and states, and what a lane holds. S is the scalar of states. kSharing warps may
// share their channels: each then has a part of them.
template <typename S, int kStateLanes, int kSharing = 1>
struct Lane {
  using R = Real<S>;
  static constexpr int kParts = sizeof(S) / sizeof(R);
  static constexpr int kChannels = kStateLanes / kSharing;     // of a lane
  static constexpr int kStates = 16 / sizeof(S);               // of a lane, for each channel
  static constexpr int kSlice = kStateLanes * kStates;         // states of a warp
  static constexpr int kReals = kChannels * kStates * kParts;  // of a lane
  using States = S[kChannels][kStates];

  int lane = threadIdx.x % kWarpSize;
  int channel = (threadIdx.x / kWarpSize % kSharing * kWarpSize + lane) / kStateLanes * kChannels;  // the first one
  int state = lane % kStateLanes * kStates;  // of the slice's states, the first one

  // From or to row `row` of (rows, D, N) elements of S in any dtype; what does not exist becomes zero. A row of -1:
  // zeros. Accumulators are moved all at once, other types one after another, which is a tenth of the code.
  __device__ __forceinline__ void load_row(States& h, const Inputs& in, const WarpPlace& warp, int64_t slice,
                                           const Array& array, int64_t row) const {
    fill(h, R(0));
    if (row < 0) return;
    R* const registers = &part_of(h[0][0], 0);
    if (array.dtype == kDType<R>) {
      const R* const from = static_cast<const R*>(array.data) + row_offset(in, warp, slice, row);
      for_each_in_row<kReals>(in, warp, slice, [&](int i, int64_t at) { registers[i] = load(from + at); });
    } else {
      const int64_t first = row_offset(in, warp, slice, row);
      for_each_in_row<1>(in, warp, slice, [&](int i, int64_t at) {
        const R value = load<R>(array, first + at);
#pragma unroll
        for (int k = 0; k < kReals; ++k) registers[k] = k == i ? value : registers[k];
      });
    }
  }
  __device__ __forceinline__ void store_row(const States& h, const Inputs& in, const WarpPlace& warp, int64_t slice,
                                            const Array& array, int64_t row) const {
    const R* const registers = &part_of(h[0][0], 0);
    if (array.dtype == kDType<R>) {
      R* const to = static_cast<R*>(array.data) + row_offset(in, warp, slice, row);
      for_each_in_row<kReals>(in, warp, slice, [&](int i, int64_t at) { store(to + at, registers[i]); });
    } else {
      const int64_t first = row_offset(in, warp, slice, row);
      for_each_in_row<1>(in, warp, slice, [&](int i, int64_t at) {
        R value = registers[0];
#pragma unroll
        for (int k = 1; k < kReals; ++k) value = k == i ? registers[k] : value;
        store(array, first + at, value);
      });
    }
  }

  // The same for row `row` of (rows, N, parts, D): checkpoints, and states in the workspace.
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

  // f(which real of the lane's, place from its first one in a row) for all that exist, kAtOnce at a time.
  template <int kAtOnce, typename F>
  __device__ __forceinline__ void for_each_in_row(const Inputs& in, const WarpPlace& warp, int64_t slice, F&& f) const {
    constexpr int kOfChannel = kStates * kParts;
    const int states = states_left(in, slice, state);
#pragma unroll kAtOnce
    for (int i = 0; i < kReals; ++i) {
      const int c = i / kOfChannel, n = i % kOfChannel / kParts;
      if (channel + c < warp.count && n < states) f(i, c * in.states * kParts + i % kOfChannel);
    }
  }
  // f(n, part, element of the first channel) for all that exist, if that channel exists. Pointers step along, so that
  // no products of strides are kept in registers.
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
    visit_size(x.data, x.dtype, [&]<typename T>(const T* data) {
      constexpr int kAtOnce = 4;  // loads in flight
      const T* from = data + first + (along_time ? slow : fast) * x.n + (along_time ? fast : slow) * x.l;
#pragma unroll 1
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
            value[t][n] = {widened<R>(parts[k][0], x.dtype), widened<R>(parts[k][1], x.dtype)};
          else
            value[t][n] = widened<R>(parts[k][0], x.dtype);
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
  visit_size(x.data, x.dtype, [&](const auto* data) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kWarpChannels * kSlice; i += blockDim.x) {
      const int c = i / kSlice, n = i % kSlice;
      const int64_t s = slice * kSlice + n;
      S v = S(R(0));
      if (c < block.channels && s < in.states) {
        const int64_t at = (block.channel + c) * in.states + s;
        if constexpr (kIsComplex<S>)
          v = {widened<R>(load(data + 2 * at), x.dtype), widened<R>(load(data + 2 * at + 1), x.dtype)};
        else
          v = widened<R>(load(data + at), x.dtype);
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

// The channels of a warp for a tile of tokens: where they lie, and how their data come to shared memory and back.
#pragma once

#include "common/array.cuh"
#include "common/grid.cuh"
#include "common/load.cuh"
#include "common/sequences.cuh"
#include "selective_scan/params.h"
#include "selective_scan/warp_tile.h"

namespace seqkern::selective_scan::cuda {

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

// Where a warp's elements of a (B, D, L) tensor lie for a tile: 32 lines of 32 neighbours in memory, along time or
// channels. Time counts by place from the lowest address.
struct TileLines {
  static_assert(kTokens == kWarpSize && kWarpChannels == kWarpSize);
  bool along_time;
  int64_t first, step;  // the element of the lowest address; from a line to the next one
  bool vectorized;      // all 32 x 32 exist and lie in memory as vectors of 16 bytes do; never for fp64

  __device__ __forceinline__ TileLines(const Data& x, const WarpPlace& warp, const TimeTile& time)
      : along_time(x.time_contiguous()),
        first(warp.b * x.stride.b + warp.channel * x.stride.d + time.lowest * x.stride.l),
        step(along_time ? x.stride.d : x.stride.l) {
    const int64_t bytes = x.dtype == DType::kFloat32 ? 4 : 2;
    const uint64_t address = reinterpret_cast<uintptr_t>(x.data) + first * bytes;
    vectorized = x.dtype != DType::kFloat64 && (address | step * bytes) % 16 == 0 &&
                 time.count - time.first == kTokens && warp.count == kWarpChannels;
  }

  // f(line, kCount neighbours from place `fast` on) for kAtOnce vectors of every lane from the i-th on.
  template <int kCount, int kAtOnce, typename F>
  __device__ __forceinline__ static void for_each_vector(int i, F&& f) {
    constexpr int kVectors = kWarpSize / kCount;  // of a line
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) f(k, ((i + k) * kWarpSize + lane) / kVectors, lane % kVectors * kCount);
  }
};

// kCount neighbours of a line, from place `fast` on, between registers and shared memory.
template <bool kAlongTime, int kCount, typename R>
__device__ __forceinline__ void put(DataTile<R>& tile, const R (&values)[kCount], const TimeTile& time, int line,
                                    int fast) {
#pragma unroll
  for (int e = 0; e < kCount; e += 4) {
    if constexpr (kAlongTime) {
      R* first = tile.value + place(time.token(fast + e), line);
#pragma unroll
      for (int i = 0; i < 4; ++i) first[i * time.step()] = values[e + i];
    } else {
      store(tile.value + place(time.token(line), fast + e),
            Vector<R, 4>{{values[e], values[e + 1], values[e + 2], values[e + 3]}});
    }
  }
}
template <bool kAlongTime, int kCount, typename R>
__device__ __forceinline__ void get(const DataTile<R>& tile, R (&values)[kCount], const TimeTile& time, int line,
                                    int fast) {
#pragma unroll
  for (int e = 0; e < kCount; e += 4) {
    if constexpr (kAlongTime) {
      const R* first = tile.value + place(time.token(fast + e), line);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[e + i] = first[i * time.step()];
    } else {
      const auto part = load<4>(tile.value + place(time.token(line), fast + e));
#pragma unroll
      for (int i = 0; i < 4; ++i) values[e + i] = part[i];
    }
  }
}

// The 16-bit types share all code but the conversion itself: __nv_bfloat16 stands for either until then.
template <typename F>
__device__ __forceinline__ void visit_size(void* data, DType dtype, F&& f) {
  if (dtype == DType::kFloat32) return f(static_cast<float*>(data));
  if (dtype == DType::kFloat64) return f(static_cast<double*>(data));
  f(static_cast<__nv_bfloat16*>(data));
}
template <typename R, typename T>
__device__ __forceinline__ R widened(T value, DType dtype) {
  if constexpr (sizeof(T) == 2) {
    if (dtype == DType::kFloat16) {
      __half half;
      memcpy(&half, &value, sizeof half);
      return to<R>(half);
    }
  }
  return to<R>(value);
}
template <typename T, typename R>
__device__ __forceinline__ T narrowed(R value, DType dtype) {
  if constexpr (sizeof(T) == 2) {
    if (dtype == DType::kFloat16) {
      const __half half = to<__half>(value);
      T bits;
      memcpy(&bits, &half, sizeof bits);
      return bits;
    }
  }
  return to<T>(value);
}
template <typename U, typename R, int kVectors, int kCount>
__device__ __forceinline__ void widen(R (&values)[kVectors][kCount], const void* elements) {
  Vector<U, kCount> v[kVectors];
  memcpy(v, elements, sizeof v);
#pragma unroll
  for (int i = 0; i < kVectors * kCount; ++i) values[i / kCount][i % kCount] = to<R>(v[i / kCount][i % kCount]);
}
template <typename U, typename R, int kVectors, int kCount>
__device__ __forceinline__ void narrow(void* elements, const R (&values)[kVectors][kCount]) {
  Vector<U, kCount> v[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors * kCount; ++i) v[i / kCount][i % kCount] = to<U>(values[i / kCount][i % kCount]);
  memcpy(elements, v, sizeof v);
}

// All of a tile, 16 bytes at a time; T is float or stands for either 16-bit type. Which one it is is asked once for
// several vectors: the compiler would turn a shorter branch into both conversions.
template <typename T, bool kAlongTime, typename R>
__device__ __forceinline__ void load_vectors(DataTile<R>& tile, const Data& x, const TileLines& lines,
                                             const TimeTile& time) {
  constexpr int kCount = kVectorCount<T>, kAtOnce = 4;
  const T* from = static_cast<const T*>(x.data) + lines.first;
#pragma unroll 1
  for (int i = 0; i < kWarpSize / kCount; i += kAtOnce) {
    Vector<T, kCount> v[kAtOnce];
    lines.for_each_vector<kCount, kAtOnce>(
        i, [&](int k, int line, int fast) { v[k] = load<kCount>(from + line * lines.step + fast); });
    R values[kAtOnce][kCount];
    sizeof(T) == 2 && x.dtype == DType::kFloat16 ? widen<__half>(values, v) : widen<T>(values, v);
    lines.for_each_vector<kCount, kAtOnce>(
        i, [&](int k, int line, int fast) { put<kAlongTime>(tile, values[k], time, line, fast); });
  }
}
template <typename T, bool kAlongTime, typename R>
__device__ __forceinline__ void store_vectors(const DataTile<R>& tile, const Data& x, const TileLines& lines,
                                              const TimeTile& time) {
  constexpr int kCount = kVectorCount<T>, kAtOnce = 2;  // nothing waits for stores
  T* to = static_cast<T*>(x.data) + lines.first;
#pragma unroll 1
  for (int i = 0; i < kWarpSize / kCount; i += kAtOnce) {
    R values[kAtOnce][kCount];
    lines.for_each_vector<kCount, kAtOnce>(
        i, [&](int k, int line, int fast) { get<kAlongTime>(tile, values[k], time, line, fast); });
    Vector<T, kCount> v[kAtOnce];
    sizeof(T) == 2 && x.dtype == DType::kFloat16 ? narrow<__half>(v, values) : narrow<T>(v, values);
    lines.for_each_vector<kCount, kAtOnce>(
        i, [&](int k, int line, int fast) { store(to + line * lines.step + fast, v[k]); });
  }
}

// f(element, its place in the tile) for those of a tile that exist, one after another, f(nullptr, place) for others.
template <int kUnroll, typename F>
__device__ __forceinline__ void for_each_in_tile(const Data& x, const TileLines& lines, const WarpPlace& warp,
                                                 const TimeTile& time, F&& f) {
  visit_size(x.data, x.dtype, [&]<typename T>(T* data) {
    [[maybe_unused]] constexpr int kAtOnce = kUnroll;
    const int lane = threadIdx.x % kWarpSize;
    T* element = data + lines.first + lane;
#pragma unroll kAtOnce
    for (int line = 0; line < kWarpSize; ++line, element += lines.step) {
      const int t = time.token(lines.along_time ? lane : line), channel = lines.along_time ? line : lane;
      f(time.has(t) && channel < warp.count ? element : nullptr, place(t, channel));
    }
  });
}

// A warp's elements of a tensor into shared memory, zeros where there are none.
template <typename R>
__device__ __forceinline__ void load_tile(DataTile<R>& tile, const Data& x, const WarpPlace& warp,
                                          const TimeTile& time) {
  const TileLines lines(x, warp, time);
  if constexpr (sizeof(R) == 4) {
    if (lines.vectorized) {
      const auto load_all = [&]<bool kAlongTime>() {
        x.dtype == DType::kFloat32 ? load_vectors<float, kAlongTime>(tile, x, lines, time)
                                   : load_vectors<__nv_bfloat16, kAlongTime>(tile, x, lines, time);
      };
      return lines.along_time ? load_all.template operator()<true>() : load_all.template operator()<false>();
    }
  }
  for_each_in_tile<4>(x, lines, warp, time, [&](const auto* from, int at) {
    tile.value[at] = from ? widened<R>(load(from), x.dtype) : R(0);
  });
}

// The reverse.
template <typename R>
__device__ __forceinline__ void store_tile(const DataTile<R>& tile, const Data& x, const WarpPlace& warp,
                                           const TimeTile& time) {
  const TileLines lines(x, warp, time);
  if constexpr (sizeof(R) == 4) {
    if (lines.vectorized) {
      const auto store_all = [&]<bool kAlongTime>() {
        x.dtype == DType::kFloat32 ? store_vectors<float, kAlongTime>(tile, x, lines, time)
                                   : store_vectors<__nv_bfloat16, kAlongTime>(tile, x, lines, time);
      };
      return lines.along_time ? store_all.template operator()<true>() : store_all.template operator()<false>();
    }
  }
  for_each_in_tile<1>(x, lines, warp, time, [&]<typename T>(T* out, int at) {
    if (out) store(out, narrowed<T>(tile.value[at], x.dtype));
  });
}

}  // namespace seqkern::selective_scan::cuda

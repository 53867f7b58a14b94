// What the fused kernels share on the device: which sequences and units a thread owns, products with weights that stay
// where they are, tokens on their way, the cell, masks.
//
// A block owns a head of 8 sequences, warp w units 16 w to 16 w + 15 of them. With g = lane / 4 and q = lane % 4 a
// thread owns units 2g and 2g + 1 of its warp in sequences 2q and 2q + 1: in a product of 16 units by 8 sequences, row g
// is made unit 2g and row g + 8 unit 2g + 1, so that its sums (common/mma.cuh) are those of what it owns, for all gates.
#pragma once

#include <iterator>
#include <tuple>

#include "common/array.cuh"
#include "common/async.cuh"
#include "common/matmul.cuh"
#include "common/opaque.cuh"
#include "common/random.h"
#include "common/sequences.cuh"
#include "rnn/cells.h"
#include "rnn/tile.h"

namespace seqkern::rnn::cuda {

// Kernels are templates over the index of a cell; that of elman_tanh is for elman_relu too.
template <int kCell>
using CellOf = std::tuple_element_t<kCell, std::tuple<Lstm<float>, Gru<float>, Slstm<float>, ElmanTanh<float>>>;
template <int kCell>
inline constexpr int kNumbers = CellOf<kCell>::kCarried > 0 ? CellOf<kCell>::kCarried : 1;  // that cells pass for c

// f(a value of the type in cells.h).
template <int kCell, typename F>
__device__ __forceinline__ float with_cell(Cell cell, F&& f) {
  if constexpr (kCell == static_cast<int>(Cell::kElmanTanh)) {
    if (cell == Cell::kElmanRelu) return f(ElmanRelu<float>());
  }
  return f(CellOf<kCell>());
}

template <typename T>
using Pair = Vector<T, 2>;  // two neighbouring units

// 16 bytes of a row of an operand. Its halves, two registers each, are what a thread gives of that row to two products.
using Chunk = Vector<uint32_t, 4>;
template <typename T>
inline constexpr int kPerChunk = kChunkBytes / sizeof(T);

template <typename T>
__device__ __forceinline__ Chunk chunk_of(const Vector<T, kPerChunk<T>>& elements) {
  Chunk chunk;
  memcpy(&chunk, &elements, sizeof(chunk));
  return chunk;
}

// One of the two sequences that a thread owns units of.
struct Row {
  bool exists;
  int tokens;     // 0 where the row does not exist
  int64_t state;  // row of the states
  int64_t b;      // batch row
  int64_t first;  // place of the first token in memory
};

struct Place {
  int64_t head;
  int unit;       // the first of two, in the head
  int exist;      // of the two: 0, 1 or 2
  int row;        // the first of two, among the 8 of the block
  int direction;  // of time in memory
  Row rows[2];
  int longest;  // tokens of the longest sequence of the block

  __device__ __forceinline__ Place(const Inputs& in, const Fused& fused) {
    const Sequences& s = in.sequences;
    const int lane = threadIdx.x % kWarpSize;
    const auto [block_head, tile] = divide(blockIdx.x, fused.tiles);
    head = block_head;
    unit = threadIdx.x / kWarpSize * kStrip + lane / 4 * 2;
    exist = static_cast<int>(clamp(in.units - unit, 0, 2));
    row = lane % 4 * 2;
    direction = s.reverse ? -1 : 1;
    const int64_t count = s.cu_seqlens ? s.count : s.batch;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t n = tile * kRows + row + j;
      const bool exists = n < count;
      const Span span = !exists ? Span{0, 0, 0, true} : s.cu_seqlens ? packed_span(s, n) : Span{0, s.length, n, false};
      rows[j] = {.exists = exists,
                 .tokens = static_cast<int>(span.end - span.begin),
                 .state = n,
                 .b = s.cu_seqlens ? 0 : n,
                 .first = memory_place(s, span.begin)};
    }
    longest = max(rows[0].tokens, rows[1].tokens);
    longest = max(longest, __shfl_xor_sync(0xffffffffu, longest, 1));
    longest = max(longest, __shfl_xor_sync(0xffffffffu, longest, 2));
  }

  // Of token `i` of row j, counted as time runs: its number b L + l.
  __device__ __forceinline__ int64_t token(const Inputs& in, int j, int i) const {
    return rows[j].b * in.sequences.length + rows[j].first + direction * i;
  }
};

// An operand (8, depth) of products, in shared memory. Its chunks lie so that neither the threads that read blocks of
// depth nor those that write pairs of units meet in a bank: of 8 neighbouring ones the row says the order.
template <typename T>
struct Operand {
  Chunk* data;  // (8, row_chunks)
  int row_chunks;

  __device__ __forceinline__ static int at(int row, int chunk) { return chunk ^ (row & 6) ^ (row & 1) << 2; }

  __device__ __forceinline__ void put(int row, int k, float low, float high) const {
    const Pair<T> pair{{to<T>(low), to<T>(high)}};
    using Words = Vector<uint32_t, sizeof(pair) / sizeof(uint32_t)>;
    Words words;
    memcpy(&words, &pair, sizeof(pair));
    Chunk& chunk = data[row * row_chunks + at(row, k / kPerChunk<T>)];
    *reinterpret_cast<Words*>(&chunk[k % kPerChunk<T> * sizeof(T) / sizeof(uint32_t)]) = words;
  }
  // Chunk q of a block of depth in row g.
  __device__ __forceinline__ Chunk get(int block) const {
    const int lane = threadIdx.x % kWarpSize;
    return data[lane / 4 * row_chunks + at(lane / 4, block * kBlockChunks + lane % 4)];
  }
  // All threads of the block.
  __device__ __forceinline__ void clear() const {
    for (int i = threadIdx.x; i < kRows * row_chunks; i += blockDim.x) data[i] = {};
  }
};

// The shared memory of a block: the two operands of which one is read while the other is written, and what follows.
template <typename T>
struct Shared {
  Chunk* all;
  int row_chunks;
  float* bias;  // (G, units)
  Chunk* ring;
  Chunk* rest;

  __device__ __forceinline__ explicit Shared(const Fused& fused)
      : all(&shared_memory<Chunk>()),
        row_chunks(fused.row_chunks),
        bias(reinterpret_cast<float*>(all + fused.bias_at / kChunkBytes)),
        ring(all + fused.ring_at / kChunkBytes),
        rest(all + fused.rest_at / kChunkBytes) {}

  __device__ __forceinline__ Operand<T> operand(int i) const {
    return {all + i % 2 * kRows * row_chunks, row_chunks};
  }

  __device__ __forceinline__ static int units() { return blockDim.x / kWarpSize * kStrip; }
  // Units that do not exist have none.
  __device__ __forceinline__ void take_bias(const Inputs& in, int64_t head, int gates) const {
    for (int i = threadIdx.x; i < gates * units(); i += blockDim.x) {
      const int gate = i / units(), unit = i % units();
      const bool exists = in.bias && unit < in.units;
      bias[i] = exists ? load<float>(in.bias, (head * gates + gate) * in.units + unit) : 0.0f;
    }
  }
  // The sums of products that bias is added to.
  template <int kGates, int kChains>
  __device__ __forceinline__ void begin_sums(float (&sum)[kGates][kChains][4], const Place& place) const {
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      const auto pair = *reinterpret_cast<const Pair<float>*>(bias + g * units() + place.unit);
#pragma unroll
      for (int n = 0; n < kChains * 4; ++n) sum[g][n / 4][n % 4] = n < 4 ? pair[n / 2] : 0.0f;
    }
  }
};

// Of unit e and row j of a thread: all chains together.
template <int kChains>
__device__ __forceinline__ float sum_of(const float (&sum)[kChains][4], int e, int j) {
  float total = sum[0][2 * e + j];
#pragma unroll
  for (int chain = 1; chain < kChains; ++chain) total += sum[chain][2 * e + j];
  return total;
}

// d += a b on fragments of T's products (common/mma.cuh), those of fp32 in the arithmetic of common/matmul.cuh.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 2) {
    mma_m16n8k16<T>(d, a, b);
  } else {
    const auto split = [](auto& halves, const auto& bits) {
#pragma unroll
      for (size_t i = 0; i < std::size(bits); ++i) {
        float x;
        memcpy(&x, &bits[i], sizeof(x));
        halves.set(static_cast<int>(i), x, true);
      }
    };
    seqkern::detail::Halves<4> left;
    seqkern::detail::Halves<2> right;
    split(left, a), split(right, b);
    mma_m16n8k8_tf32(d, left.low, right.high);  // the small terms first
    mma_m16n8k8_tf32(d, left.high, right.low);
    mma_m16n8k8_tf32(d, left.high, right.high);
  }
}

// d (16, 8) += a b over a block of depth. a: chunks of the rows that a thread gives, b: that of its column. Which of
// the block's numbers a product takes at once does not matter as long as a and b agree. Two chains of sums: even, odd.
template <typename T>
__device__ __forceinline__ void multiply_block(float (&even)[4], float (&odd)[4], const Chunk (&a)[2], const Chunk& b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t left[4] = {a[0][2 * half], a[1][2 * half], a[0][2 * half + 1], a[1][2 * half + 1]};
    const uint32_t right[2] = {b[2 * half], b[2 * half + 1]};
    multiply_add<T>(half == 0 ? even : odd, left, right);
  }
}

// Weights of a warp: kTiles matrices (16, depth). Of each the first kHeld blocks of depth are in registers, the rest in
// shared memory.
template <typename T, int kTiles, int kHeld>
struct Stationary {
  static constexpr int kChunks = kTiles * 2;  // of a thread, for each block of depth
  Chunk held[kHeld][kTiles][2];
  const Chunk* rest;  // this thread's, of (depth - kHeld, kTiles, 2, threads)
  int depth;          // blocks

  // fill(tile, k, chunks): elements k, k + 1.. of the rows of units 2g and 2g + 1. `own` is room for kChunks, one for
  // each thread of the block after the other.
  template <typename F>
  __device__ __forceinline__ Stationary(const Fused& fused, Chunk* own, Chunk* rest_of_block, F&& fill)
      : rest(rest_of_block + threadIdx.x), depth(fused.depth) {
    const int k = threadIdx.x % 4 * kPerChunk<T>;
#pragma unroll 1
    for (int block = 0; block < depth; ++block) {
      Chunk* const to = threadIdx.x + (block < kHeld ? own : rest_of_block + (block - kHeld) * kChunks * blockDim.x);
#pragma unroll 1
      for (int tile = 0; tile < kTiles; ++tile) {
        Chunk chunks[2];
        fill(tile, block * kBlockChunks * kPerChunk<T> + k, chunks);
        to[(2 * tile) * blockDim.x] = chunks[0];
        to[(2 * tile + 1) * blockDim.x] = chunks[1];
      }
#pragma unroll
      for (int to_hold = 0; to_hold < kHeld; ++to_hold) {
        if (block == to_hold) take(held[to_hold], to);
      }
    }
  }

  // sum[tile] += weights[tile] operand, for this warp's 16 rows and the 8 rows of the operand. The sums of a tile are
  // cut into kChains, which do not wait for each other.
  template <int kChains>
  __device__ __forceinline__ void multiply(float (&sum)[kTiles][kChains][4], const Operand<T>& operand) {
    static_assert(kChains == 1 || kChains == 2 || kChains == 4, "one, or those of even and odd halves and blocks");
    Chunk next = operand.get(0);
#pragma unroll
    for (int block = 0; block < kHeld; ++block) {
      if (block < depth) {
        const Chunk b = next;
        next = operand.get(min(block + 1, depth - 1));
        if constexpr (sizeof(T) == 4) forget(held[block]);  // fp32 is split anew each time: halves take twice the room
        add<kChains>(sum, block % 2, held[block], b);
      }
    }
#pragma unroll 1
    for (int block = kHeld; block < depth; ++block) {
      Chunk a[kTiles][2];
      take(a, rest + (block - kHeld) * kChunks * blockDim.x);
      const Chunk b = next;
      next = operand.get(min(block + 1, depth - 1));
      add<kChains>(sum, 0, a, b);
    }
  }

 private:
  __device__ __forceinline__ static void forget(Chunk (&a)[kTiles][2]) {
#pragma unroll
    for (int i = 0; i < kTiles * 2 * 4; ++i) make_opaque(a[i / 8][i / 4 % 2][i % 4]);
  }
  __device__ __forceinline__ static void take(Chunk (&a)[kTiles][2], const Chunk* from) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      a[tile][0] = from[2 * tile * blockDim.x];
      a[tile][1] = from[(2 * tile + 1) * blockDim.x];
    }
  }
  template <int kChains>
  __device__ __forceinline__ static void add(float (&sum)[kTiles][kChains][4], int odd_block, const Chunk (&a)[kTiles][2],
                                             const Chunk& b) {
    const int chain = kChains == 4 ? 2 * odd_block : 0;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      multiply_block<T>(sum[tile][chain], sum[tile][kChains > 1 ? chain + 1 : 0], a[tile], b);
    }
  }
};

// Whether every two neighbouring units of tokens are one aligned access. An absent tensor does not object.
template <typename T, typename Data>
__device__ __forceinline__ bool paired(const Data& of, int64_t apart = 0) {
  return !of || (reinterpret_cast<uintptr_t>(of.data) % sizeof(Pair<T>) == 0 && ((of.b | of.l | of.h | apart) & 1) == 0);
}

// Two units of a token, to and from elements T of which `exist` exist.
template <typename T>
__device__ __forceinline__ void put_pair(T* to_place, float low, float high, int exist, bool paired) {
  if (paired && exist == 2) return store(to_place, Pair<T>{{to<T>(low), to<T>(high)}});
  if (exist > 0) store(to_place, to<T>(low));
  if (exist > 1) store(to_place + 1, to<T>(high));
}
// Into shared memory, units that do not exist as zeros; asynchronously where it can be.
template <typename T>
__device__ __forceinline__ void fetch_pair(Pair<T>* to_place, const T* from, int exist, bool paired) {
  if (paired) {
    copy_async<sizeof(Pair<T>)>(to_place, from, exist * static_cast<int>(sizeof(T)));
  } else {
    *to_place = {{exist > 0 ? load(from) : to<T>(0.0f), exist > 1 ? load(from + 1) : to<T>(0.0f)}};
  }
}

// Where this thread's units lie in a tensor of tokens with elements T: in the tokens that its two rows have come to.
template <typename T>
struct Track {
  T* data;
  int64_t at[2];  // in elements

  // At token `i` of each row.
  template <typename Data>
  __device__ __forceinline__ Track(const Data& of, const Place& place, int i) : data(static_cast<T*>(of.data)) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const Row& row = place.rows[j];
      at[j] = row.b * of.b + (row.first + place.direction * i) * of.l + place.head * of.h + place.unit;
    }
  }

  __device__ __forceinline__ T* of_row(int j, int64_t offset = 0) const { return data + (at[j] + offset); }

  // To the next token, or by as many.
  template <typename Data>
  __device__ __forceinline__ void move(const Data& of, int tokens) {
#pragma unroll
    for (int j = 0; j < 2; ++j) at[j] += tokens * of.l;
  }
};

// Elements (row, head, unit) and (row, head, unit + 1) of states (rows, H, size).
__device__ __forceinline__ void load_state(float (&s)[2], const Array& states, const Inputs& in, const Place& place,
                                           int64_t row, int64_t size) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (e < place.exist) s[e] = load<float>(states, (row * in.heads + place.head) * size + place.unit + e);
  }
}
__device__ __forceinline__ void store_state(const float (&s)[2], const Array& states, const Inputs& in,
                                            const Place& place, int64_t row, int64_t size) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (e < place.exist) store(states, (row * in.heads + place.head) * size + place.unit + e, s[e]);
  }
}

// What a thread carries of a row: h and c of its two units.
template <int kCell>
struct State {
  float h[2], c[2][kNumbers<kCell>];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      h[e] = 0.0f;
      CellOf<kCell>::empty(c[e]);
    }
  }
  // Of the sequence of row j, before its first token.
  __device__ __forceinline__ void begin(const Inputs& in, const Place& place, int j) {
    clear();
    load(in.initial_h, in.initial_c, in, place, j);
  }
  // The rows of states that the sequence of row j owns, where there are such states.
  __device__ __forceinline__ void load(const Array& of_h, const Array& of_c, const Inputs& in, const Place& place,
                                       int j) {
    if (!place.rows[j].exists) return;
    const int64_t row = place.rows[j].state;
    if (of_h) load_state(h, of_h, in, place, row, in.outputs);
    if (!of_c) return;
    each_number([&](int number, float(&pair)[2]) {
      load_state(pair, of_c, in, place, number * in.sequences.count + row, in.units);
    });
  }
  __device__ __forceinline__ void store(const Array& of_h, const Array& of_c, const Inputs& in, const Place& place,
                                        int j) {
    if (!place.rows[j].exists) return;
    const int64_t row = place.rows[j].state;
    if (of_h) store_state(h, of_h, in, place, row, in.outputs);
    if (!of_c) return;
    each_number([&](int number, const float(&pair)[2]) {
      store_state(pair, of_c, in, place, number * in.sequences.count + row, in.units);
    });
  }
  // f(number, pair) of the numbers of c, which may change them.
  template <typename F>
  __device__ __forceinline__ void each_number(F&& f) {
#pragma unroll
    for (int number = 0; number < CellOf<kCell>::kCarried; ++number) {
      float pair[2] = {c[0][number], c[1][number]};
      f(number, pair);
      c[0][number] = pair[0], c[1][number] = pair[1];
    }
  }
};

// Whether token `i` of row j, which exists, starts anew.
__device__ __forceinline__ bool starts_anew(const Inputs& in, const Place& place, int j, int i) {
  return in.reset && load(in.reset + place.token(in, j, i));
}

// Random words of the units of this thread (common/random.h, params.h).
__device__ __forceinline__ void random_words(uint32_t (&word)[2], const Inputs& in, const Place& place, uint64_t first,
                                             RandomKind kind) {
  const uint64_t element = place.head * in.outputs + place.unit, seed = load(in.seed);
  const auto draw = [&](uint64_t of) {
    const Random4 four = philox(seed, first, static_cast<uint32_t>(of / 4), kind);
    const uint32_t even = of & 2 ? four.word[2] : four.word[0], odd = of & 2 ? four.word[3] : four.word[1];
    return of & 1 ? odd : even;
  };
  word[0] = draw(element), word[1] = draw(element + 1);
}

// [dropout]: what the elements of h are multiplied with where the product of row j reads them.
__device__ __forceinline__ void dropout_scale(float (&scale)[2], const Inputs& in, const Place& place, int j) {
  scale[0] = scale[1] = 1.0f;
  if (!in.drops() || !place.rows[j].exists) return;
  const float probability = static_cast<float>(in.recurrent_dropout);
  uint32_t word[2];
  random_words(word, in, place, place.rows[j].state, kDropoutWords);
#pragma unroll
  for (int e = 0; e < 2; ++e) scale[e] = happens(word[e], probability) ? 0.0f : 1.0f / (1.0f - probability);
}

// [zoneout]: how much of h_{t-1} there is in h_t, for token `i` of row j.
__device__ __forceinline__ void zoneout_share(float (&share)[2], const Inputs& in, const Place& place, int j,
                                              int i) {
  const float probability = static_cast<float>(in.zoneout);
  share[0] = share[1] = probability;
  if (!in.training) return;
  uint32_t word[2];
  random_words(word, in, place, place.token(in, j, i), kZoneoutWords);
#pragma unroll
  for (int e = 0; e < 2; ++e) share[e] = happens(word[e], probability) ? 1.0f : 0.0f;
}

__device__ __forceinline__ float zoned(float share, float before, float now) {
  return share == 0.0f ? now : share == 1.0f ? before : fmaf(share, before, (1.0f - share) * now);
}

}  // namespace seqkern::rnn::cuda

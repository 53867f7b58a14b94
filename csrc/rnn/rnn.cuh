// What the fused kernels share on the device: which sequences and units a thread owns, products with weights that stay
// where they are, tokens on their way, the cell, masks.
//
// A block owns a head of 8 sequences, warp w units 16 w to 16 w + 15 of them. With g = lane / 4 and q = lane % 4 a
// thread owns units 2g and 2g + 1 of its warp in sequences 2q and 2q + 1: in a product of 16 units by 8 sequences, row
// g is made unit 2g and row g + 8 unit 2g + 1, so that its sums (common/mma.cuh) are those of what it owns, for all
// gates.
#pragma once

#include <iterator>

#include "common/array.cuh"
#include "common/async.cuh"
#include "common/matmul.cuh"
#include "common/opaque.cuh"
#include "common/random.h"
#include "common/sequences.cuh"
#include "rnn/cell.cuh"
#include "rnn/tile.h"

namespace seqkern::rnn::cuda {

template <typename T>
using Pair = Vector<T, 2>;  // two neighbouring units

// The same as the registers hold them, so that they are stored by one access.
template <typename T>
using PairWords = Vector<uint32_t, sizeof(Pair<T>) / sizeof(uint32_t)>;
template <typename T>
__device__ __forceinline__ PairWords<T> words_of(float low, float high) {
  const Pair<T> pair{{to<T>(low), to<T>(high)}};
  PairWords<T> words;
  memcpy(&words, &pair, sizeof(words));
  return words;
}

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

// One of the 8 sequences of a block.
struct Row {
  bool exists;
  int tokens;               // 0 where the row does not exist
  int64_t state;            // row of the states
  int64_t b;                // batch row
  int64_t first;            // place of the first token in memory
  int64_t begins[kTracks];  // where it lies in tensors
};
static_assert(sizeof(Row) == kRowBytes);

__device__ __forceinline__ Row row_of(const Sequences& s, int64_t n) {
  if (n >= (s.cu_seqlens ? s.count : s.batch)) return {};
  const Span span = s.cu_seqlens ? packed_span(s, n) : Span{0, s.length, n, false};
  return {.exists = true,
          .tokens = static_cast<int>(span.end - span.begin),
          .state = n,
          .b = s.cu_seqlens ? 0 : n,
          .first = memory_place(s, span.begin),
          .begins = {}};
}

// What a thread owns, and where its block finds things.
struct Place {
  const Sequences& sequences;
  int head;
  int unit;     // the first of two, in the head
  int exist;    // of the two: 0, 1 or 2
  int row;      // the first of two, among the 8 of the block
  int longest;  // tokens of the longest sequence of the block
  Row* rows;    // the two, in shared memory

  // All threads of the block.
  __device__ __forceinline__ Place(const Inputs& in, const Fused& fused, Row* of_block) : sequences(in.sequences) {
    const int lane = threadIdx.x % kWarpSize;
    const auto [block_head, tile] = divide(blockIdx.x, fused.tiles);
    if (threadIdx.x < kRows) of_block[threadIdx.x] = row_of(in.sequences, tile * kRows + threadIdx.x);
    head = static_cast<int>(block_head);
    unit = threadIdx.x / kWarpSize * kStrip + lane / 4 * 2;
    exist = static_cast<int>(clamp(in.units - unit, 0, 2));
    row = lane % 4 * 2;
    rows = of_block + row;
    __syncthreads();
    longest = 0;
    for (int i = 0; i < kRows; ++i) longest = max(longest, of_block[i].tokens);
  }

  // From the first token of a row to token `i`, as time runs.
  __device__ __forceinline__ int64_t way(int i) const { return sequences.reverse ? -i : i; }
  // Of token `i` of row j: its number b L + l.
  __device__ __forceinline__ int64_t token(const Inputs& in, int j, int i) const {
    return rows[j].b * in.sequences.length + rows[j].first + way(i);
  }
};

// An operand (8, depth) of products, in shared memory. Its chunks lie so that neither the threads that read blocks of
// depth nor those that write pairs of units meet in a bank: of 8 neighbouring ones the row says the order.
template <typename T>
struct Operand {
  Chunk* data;  // (8, row_chunks)
  int row_chunks;

  __device__ __forceinline__ static int at(int row, int chunk) { return chunk ^ (row & 6) ^ (row & 1) * 4; }

  __device__ __forceinline__ void put(int row, int k, float low, float high) const {
    Chunk& chunk = data[row * row_chunks + at(row, k / kPerChunk<T>)];
    auto* const words = &chunk[k % kPerChunk<T> * sizeof(T) / sizeof(uint32_t)];
    *reinterpret_cast<PairWords<T>*>(words) = words_of<T>(low, high);
  }
  // All threads of the block.
  __device__ __forceinline__ void clear() const {
    for (int i = threadIdx.x; i < kRows * row_chunks; i += blockDim.x) data[i] = {};
  }
};

// Of rows g of an operand, chunks q of blocks of depth.
struct BlockReader {
  const Chunk* data;
  int first;  // that of block 0

  template <typename T>
  __device__ __forceinline__ explicit BlockReader(const Operand<T>& operand) : data(operand.data) {
    const int row = threadIdx.x % kWarpSize / 4, q = threadIdx.x % 4;
    first = row * operand.row_chunks + operand.at(row, q);
  }
  __device__ __forceinline__ Chunk get(int block) const {
    return data[(first ^ block % 2 * kBlockChunks) + block / 2 * kPeriodChunks];
  }
};

// The shared memory of a block: the two operands of which one is read while the other is written, and what follows.
template <typename T>
struct Shared {
  Chunk* all;
  int row_chunks;
  float* bias;  // (G, units)
  Row* rows;    // (8,)
  Chunk* ring;
  Chunk* rest;

  __device__ __forceinline__ explicit Shared(const Fused& fused)
      : all(&shared_memory<Chunk>()),
        row_chunks(fused.row_chunks),
        bias(reinterpret_cast<float*>(all + fused.bias_at / kChunkBytes)),
        rows(reinterpret_cast<Row*>(all + fused.rows_at / kChunkBytes)),
        ring(all + fused.ring_at / kChunkBytes),
        rest(all + fused.rest_at / kChunkBytes) {}

  __device__ __forceinline__ Operand<T> operand(int i) const { return {all + i % 2 * kRows * row_chunks, row_chunks}; }

  __device__ __forceinline__ static int units() { return blockDim.x / kWarpSize * kStrip; }
  // Units that do not exist have none.
  __device__ __forceinline__ void take_bias(const Inputs& in, int head, int gates) const {
    for (int i = threadIdx.x; i < gates * units(); i += blockDim.x) {
      const int gate = i / units(), unit = i % units();
      const bool exists = in.bias && unit < in.units;
      bias[i] = exists ? load<float>(in.bias, (int64_t{head} * gates + gate) * in.units + unit) : 0.0f;
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

// Weights of a warp: kTiles matrices (16, depth), as fragments: what a thread gives to one product, in the order of its
// registers. A block of depth takes two of each matrix, one for each half of its operand's chunks; which of the block's
// numbers a product takes at once does not matter as long as both operands agree. The first kHeld blocks are in
// registers, the rest, where there can be one, in shared memory.
template <typename T, int kTiles, int kHeld, bool kRest>
struct Stationary {
  using Fragment = Vector<uint32_t, 4>;
  Fragment held[kHeld][2][kTiles];
  const Fragment* rest;  // this thread's, of (depth - kHeld, 2, kTiles, threads)
  int depth;             // blocks

  // fill(tile, k, chunks): elements k, k + 1.. of the rows of units 2g and 2g + 1. `own` is room for the fragments of a
  // block of depth.
  template <typename F>
  __device__ __forceinline__ Stationary(const Fused& fused, Chunk* own, Chunk* rest_of_block, F&& fill)
      : rest(rest_of_block + threadIdx.x), depth(fused.depth) {
#pragma unroll 1
    for (int block = 0; block < depth; ++block) {
      const int k = (block * kBlockChunks + static_cast<int>(threadIdx.x) % kBlockChunks) * kPerChunk<T>;
      Fragment* const to =
          threadIdx.x + (block < kHeld ? own : rest_of_block + (block - kHeld) * 2 * kTiles * blockDim.x);
#pragma unroll 1
      for (int tile = 0; tile < kTiles; ++tile) {
        Chunk row[2];
        fill(tile, k, row);
        to[tile * blockDim.x] = {{row[0][0], row[1][0], row[0][1], row[1][1]}};
        to[(kTiles + tile) * blockDim.x] = {{row[0][2], row[1][2], row[0][3], row[1][3]}};
      }
#pragma unroll
      for (int to_hold = 0; to_hold < kHeld; ++to_hold) {
        if (block != to_hold) continue;
        take(held[to_hold][0], to), take(held[to_hold][1], to + kTiles * blockDim.x);
      }
    }
  }

  // sum[tile] += weights[tile] operand, for this warp's 16 rows and the 8 rows of the operand. The sums of a tile are
  // cut into kChains, which do not wait for each other.
  template <int kChains>
  __device__ __forceinline__ void multiply(float (&sum)[kTiles][kChains][4], const Operand<T>& operand) {
    static_assert(kChains == 1 || kChains == 2 || kChains == 4, "one, or those of even and odd halves and blocks");
    const BlockReader reader(operand);
    Chunk next = reader.get(0);
#pragma unroll
    for (int block = 0; block < kHeld; ++block) {
      if (block >= depth) continue;
      const Chunk b = next;
      if (block + 1 < kHeld && block + 1 < depth) next = reader.get(block + 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (sizeof(T) == 4) forget(held[block][half]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          add<kChains>(sum[tile], 2 * block + half, held[block][half][tile], b);
        }
      }
    }
    if constexpr (kRest) {
#pragma unroll 1
      for (int block = kHeld; block < depth; ++block) {
        const Chunk b = reader.get(block);
        const Fragment* const a = rest + (block - kHeld) * 2 * kTiles * blockDim.x;
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) add<kChains>(sum[i % kTiles], i / kTiles, a[i * blockDim.x], b);
      }
    }
  }

 private:
  __device__ __forceinline__ static void take(Fragment (&a)[kTiles], const Fragment* from) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) a[tile] = from[tile * blockDim.x];
  }
  // fp32 is split into halves anew each time: kept, they would take twice the registers.
  __device__ __forceinline__ static void forget(Fragment (&a)[kTiles]) {
#pragma unroll
    for (int i = 0; i < kTiles * 4; ++i) make_opaque(a[i / 4][i % 4]);
  }
  // Half number `half` of the depth.
  template <int kChains>
  __device__ __forceinline__ static void add(float (&sum)[kChains][4], int half, const Fragment& a, const Chunk& b) {
    const uint32_t right[2] = {b[half % 2 * 2], b[half % 2 * 2 + 1]};
    multiply_add<T>(sum[half % kChains], a.element, right);
  }
};

// Whether every two neighbouring units of tokens are one aligned access. An absent tensor does not object.
template <typename T, typename Data>
__device__ __forceinline__ bool paired(const Data& of, int64_t apart = 0) {
  return !of ||
         (reinterpret_cast<uintptr_t>(of.data) % sizeof(Pair<T>) == 0 && ((of.b | of.l | of.h | apart) & 1) == 0);
}

// Two units of a token, to and from elements T of which `exist` exist.
template <typename T>
__device__ __forceinline__ void put_pair(T* to_place, float low, float high, int exist, bool paired) {
  if (paired && exist == 2) return store(reinterpret_cast<uint32_t*>(to_place), words_of<T>(low, high));
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

// Where this thread's units lie in a tensor of tokens with elements T. Where the rows begin is in shared memory, as
// pointers that moved along would take more registers than there are.
template <typename T, typename Data>
struct Track {
  const Data& of;
  const Place& place;
  int number;  // below kTracks, each tensor's own

  // All threads of the block; to be used after __syncthreads().
  __device__ __forceinline__ Track(const Data& of, const Place& place, int number)
      : of(of), place(place), number(number) {
    if (threadIdx.x >= kRows) return;
    Row& row = place.rows[static_cast<int>(threadIdx.x) - place.row];
    row.begins[number] = row.b * of.b + row.first * of.l + place.head * of.h;
  }
  // In token `i` of row j, `apart` elements on.
  __device__ __forceinline__ T* at(int j, int i, int64_t apart = 0) const {
    return static_cast<T*>(of.data) + (place.rows[j].begins[number] + place.way(i) * of.l + place.unit + apart);
  }
};

// Elements (row, head, unit) and (row, head, unit + 1) of states (rows, H, size).
__device__ __forceinline__ void load_state(float (&s)[2], const Array& states, const Inputs& in, const Place& place,
                                           int64_t row, int64_t size) {
  visit(ArrayFor<float>{states}, [&](const auto* data) {
    const auto* from = data + (row * in.heads + place.head) * size + place.unit;
#pragma unroll
    for (int e = 0; e < 2; ++e) s[e] = e < place.exist ? to<float>(load(from + e)) : s[e];
  });
}
// The same of fp32.
__device__ __forceinline__ void load_state(float (&s)[2], const float* states, const Inputs& in, const Place& place,
                                           int64_t row, int64_t size) {
  const float* from = states + (row * in.heads + place.head) * size + place.unit;
#pragma unroll
  for (int e = 0; e < 2; ++e) s[e] = e < place.exist ? seqkern::load(from + e) : s[e];
}
__device__ __forceinline__ void store_state(const float (&s)[2], const Array& states, const Inputs& in,
                                            const Place& place, int64_t row, int64_t size) {
  put_pair(static_cast<float*>(states.data) + (row * in.heads + place.head) * size + place.unit, s[0], s[1],
           place.exist, false);
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
  // The rows of states that the sequence of row j owns, where there are such states: arrays of any type, or fp32.
  template <typename States>
  __device__ __forceinline__ void load(const States& of_h, const States& of_c, const Inputs& in, const Place& place,
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

// Without an index into registers.
__device__ __forceinline__ uint32_t word_of(const Random4& four, int i) {
  return i == 0 ? four.word[0] : i == 1 ? four.word[1] : i == 2 ? four.word[2] : four.word[3];
}

// What chance decides for what a thread owns (common/random.h, params.h): bit 2 j + e is unit e's in row j, whose words
// begin at first[j]. One after the other, in few registers.
__device__ __forceinline__ uint32_t happening(const Inputs& in, const Place& place, const int64_t (&first)[2],
                                              RandomKind kind, double probability) {
  const uint64_t element = static_cast<uint64_t>(int64_t{place.head} * in.outputs + place.unit);
  const uint32_t group = static_cast<uint32_t>(element / 4);
  const int within = static_cast<int>(element % 4);
  uint32_t bits = 0;
#pragma unroll 1
  for (int j = 0; j < 2; ++j) {
    uint64_t seed = static_cast<uint64_t>(load(in.seed));
    make_opaque(seed);
    const uint64_t position = static_cast<uint64_t>(j == 0 ? first[0] : first[1]);
    const Random4 four = philox(seed, position, group, kind);
    const uint32_t word = word_of(four, within);
    const uint32_t next = within < 3 ? word_of(four, within + 1) : philox(seed, position, group + 1, kind).word[0];
    if (happens(word, static_cast<float>(probability))) bits |= 1u << (2 * j);
    if (happens(next, static_cast<float>(probability))) bits |= 2u << (2 * j);
  }
  return bits;
}
__device__ __forceinline__ bool happened(uint32_t bits, int e, int j) {
  return bits >> (2 * j + e) & 1;
}

// [dropout]: the elements of h that products of these sequences do not see. The others are multiplied with a scale.
__device__ __forceinline__ uint32_t dropped(const Inputs& in, const Place& place) {
  if (!in.drops()) return 0;
  return happening(in, place, {place.rows[0].state, place.rows[1].state}, kDropoutWords, in.recurrent_dropout);
}

// [zoneout] in training: the elements that keep their h in token `i` of the rows.
__device__ __forceinline__ uint32_t kept(const Inputs& in, const Place& place, int i) {
  if (!in.zones() || !in.training) return 0;
  return happening(in, place, {place.token(in, 0, i), place.token(in, 1, i)}, kZoneoutWords, in.zoneout);
}
}  // namespace seqkern::rnn::cuda

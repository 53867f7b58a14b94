// Scans over time of independent channels, on the paths of time_tile.h, for any recurrence.
//
// Time is processing time (sequences.cuh). An adjoint runs the other way: it scans over mirrored(sequences), whose
// first tokens are the last ones, whose initial rows are the final ones, and in which a reset of token tau - 1 keeps
// its state from token tau.
//
// A kernel makes a Recurrence for each thread, the tokens of one channel, and hands it to serial_scan or tile_scan. All
// lanes of a warp call its functions together, also those without a channel: these read and store nothing.
//
//   using Real                       accumulators: float or double
//   using Carry                      the state between two tokens: a struct of Reals
//   using Element                    what several tokens do to a state: likewise
//   struct Tokens                    a chunk in registers, on the way in and on the way out; empty: it lies elsewhere,
//                                    and loops over tokens are not unrolled
//   static constexpr int kTokens     of a chunk, at most 32
//
//   void fetch(int64_t tau)          starts the loads of tokens [tau, tau + kTokens); those after the row are not there
//   Tokens take()                    what was fetched last, converted
//   void store(const Tokens&, int64_t tau)
//
//   Element identity()               no token
//   void extend(Element&, const Tokens&, int i)          token i after the element
//   Element compose(const Element& later, const Element& earlier)
//   Carry apply(const Element&, const Carry&)
//   void advance(Carry&, const Tokens&, int i)           token i, nothing else
//   void emit(Carry&, Tokens&, const Token&)             token i, and its outputs into Tokens
//   void pad(Tokens&, int i)                             the outputs of a token of padding
//   void leave(const Carry&, int64_t row)                the state that follows a sequence
//   void expect(int64_t row)                             optional: before tokens of which the last has `row`
//
//   Carry initial(int64_t row, int64_t tau)   the state that enters a sequence at token tau; row -1: the empty one
//   bool reads_initial(), reads_final()    whether rows of initial and final states matter
//
// The result of a tile does not depend on timing: a state that leaves tile j is always apply(element of tile j, state
// that leaves tile j - 1), whoever computes it. Where a sequence begins, nothing of the state before it is used, not
// even times zero.
#pragma once

#include <type_traits>

#include "common/time_tokens.cuh"

namespace seqkern::time_scan {

template <typename Recurrence>
inline constexpr bool kRolled = std::is_empty_v<typename Recurrence::Tokens>;

// f(i) for tokens [begin, end) of a chunk. Registers need constant indices; where tokens lie elsewhere, what is done to
// one of them is in the code once.
template <typename Recurrence, typename F>
__device__ __forceinline__ void for_tokens(int begin, int end, const F& f) {
  if constexpr (kRolled<Recurrence>) {
#pragma unroll 1
    for (int i = begin; i < end; ++i) f(i);
  } else {
#pragma unroll
    for (int i = 0; i < Recurrence::kTokens; ++i) {
      if (i >= begin && i < end) f(i);
    }
  }
}

// The state that enters at a fresh token.
template <typename Recurrence, typename Time>
__device__ __forceinline__ typename Recurrence::Carry entering(const Recurrence& r, const Time& time, const Facts& f,
                                                               int64_t tau, int i) {
  return r.initial(r.reads_initial() ? time.initial_row(f, tau, i) : -1, tau + i);
}

// A chunk from the state that enters it to the one that leaves it, with all outputs.
template <typename Recurrence, typename Time>
__device__ __forceinline__ void walk(Recurrence& r, const Time& time, const Facts& f, int64_t tau,
                                     typename Recurrence::Tokens& x, typename Recurrence::Carry& carry) {
  if constexpr (!kRolled<Recurrence>) {
    if (f.template plain<Recurrence::kTokens>()) {
#pragma unroll
      for (int i = 0; i < Recurrence::kTokens; ++i) r.emit(carry, x, Token{i});
      return;
    }
  }
  // Piece by piece, each from a token that starts anew to the next; so a sequence ends where a piece does.
#pragma unroll 1
  for (int begin = 0, end; begin < f.count; begin = end) {
    const uint32_t later = f.fresh & (~1u << begin);
    end = later ? min(__ffs(static_cast<int>(later)) - 1, f.count) : f.count;
    if (f.fresh >> begin & 1u) carry = entering(r, time, f, tau, begin);
    const bool padding = (f.padding >> begin & 1u) != 0, ends = (f.last >> (end - 1) & 1u) != 0;
    const int64_t row = ends && r.reads_final() ? time.final_row(f, tau, end - 1) : -1;
    if constexpr (requires { r.expect(row); }) r.expect(row);
    for_tokens<Recurrence>(begin, end, [&](int i) {
      if (padding)
        r.pad(x, i);
      else
        r.emit(carry, x, Token{i, (f.reset >> i & 1u) != 0, ends && i == end - 1, row});
    });
    if (row >= 0) r.leave(carry, row);
  }
}

// Tokens [begin, end) of a chain, by one warp, from the state that enters them; returns the one that leaves. They are
// whole chunks, or end with the row. The loads of the next chunk are under way while one is walked through.
template <typename Recurrence>
__device__ __forceinline__ typename Recurrence::Carry serial_scan(Recurrence& r, const Sequences& s, const bool* reset,
                                                                  bool adjoint, int64_t b, int64_t begin, int64_t end,
                                                                  typename Recurrence::Carry carry) {
  constexpr int kTokens = Recurrence::kTokens;
  Timeline<kTokens> time(s, reset, adjoint, b);
  r.fetch(begin), time.fetch(begin);
#pragma unroll 1
  for (int64_t tau = begin; tau < end; tau += kTokens) {
    typename Recurrence::Tokens x = r.take();
    const Facts facts = time.take(tau);
    r.fetch(tau + kTokens), time.fetch(tau + kTokens);
    walk(r, time, facts, tau, x, carry);
    r.store(x, tau);
  }
  return carry;
}

// A chain from end to end.
template <typename Recurrence>
__device__ __forceinline__ void serial_scan(Recurrence& r, const Sequences& s, const bool* reset, bool adjoint,
                                            int64_t b) {
  serial_scan(r, s, reset, adjoint, b, 0, s.length, r.initial(-1, 0));
}

// Tiles. What a tile does to a state that enters it is an Element; where a sequence begins in it, the state that leaves
// it is known without.

template <typename Recurrence>
struct TileShared {
  typename Recurrence::Element element[kTileWarps][kWarpSize];  // of a warp's chunk, or
  typename Recurrence::Carry carry[kTileWarps][kWarpSize];      // the state that leaves it, where
  bool known[kTileWarps];                                       // that is known; the same for the tile:
  typename Recurrence::Carry entering[kWarpSize];
};

// What tiles tell each other: flag (tiles of a chain side by side), element and carry of each tile. Made by one warp of
// a block, used by all its lanes together.
template <typename Recurrence>
class Board {
  using R = typename Recurrence::Real;
  using Element = typename Recurrence::Element;
  using Carry = typename Recurrence::Carry;
  enum : uint32_t { kNothing, kElement, kCarry };

 public:
  __device__ __forceinline__ Board(const Cut& cut, void* workspace, const Place& place)
      : flags_(static_cast<uint32_t*>(workspace) + place.chain * cut.tiles),
        elements_(at(workspace, cut.elements_at, place.chain * cut.tiles, sizeof(Element))),
        carries_(at(workspace, cut.carries_at, place.chain * cut.tiles, sizeof(Carry))),
        tile_(place.tile) {}

  __device__ __forceinline__ void publish_element(const Element& element) { publish(elements_, element, kElement); }
  __device__ __forceinline__ void publish_carry(const Carry& carry) { publish(carries_, carry, kCarry); }

  // The state that enters the tile. Lane i waits for tile i + 1 before it (before those already looked at); the nearest
  // tile whose leaving state is known begins, those after it are applied in order of time.
  __device__ __forceinline__ Carry look_back(const Recurrence& r) const {
    int64_t known = tile_;
    for (uint32_t carries = 0; carries == 0;) {
      const int64_t other = known - 1 - lane_of();
      uint32_t flag = kNothing;
      if (other >= 0) spin_until([&] { return (flag = load_acquire(flags_ + other)) != kNothing; });
      carries = __ballot_sync(0xffffffffu, flag == kCarry);
      known -= carries ? __ffs(static_cast<int>(carries)) : kWarpSize;
    }
    __syncwarp();
    Carry carry = read<Carry>(carries_, known);
#pragma unroll 4
    for (int64_t tile = known + 1; tile < tile_; ++tile) carry = r.apply(read<Element>(elements_, tile), carry);
    return carry;
  }

 private:
  __device__ __forceinline__ static R* at(void* workspace, int64_t offset, int64_t tile, int64_t bytes) {
    return reinterpret_cast<R*>(static_cast<unsigned char*>(workspace) + offset + tile * bytes * kWarpSize);
  }

  // Of each tile, every Real of all lanes side by side.
  template <typename T>
  __device__ __forceinline__ static T read(const R* from, int64_t tile) {
    constexpr int kReals = sizeof(T) / sizeof(R);
    R reals[kReals];
#pragma unroll
    for (int k = 0; k < kReals; ++k) reals[k] = load(from + (tile * kReals + k) * kWarpSize + lane_of());
    T value;
    memcpy(static_cast<void*>(&value), reals, sizeof(T));
    return value;
  }
  template <typename T>
  __device__ __forceinline__ void publish(R* out, const T& value, uint32_t flag) {
    constexpr int kReals = sizeof(T) / sizeof(R);
    R reals[kReals];
    memcpy(reals, &value, sizeof(T));
#pragma unroll
    for (int k = 0; k < kReals; ++k) store(out + (tile_ * kReals + k) * kWarpSize + lane_of(), reals[k]);
    __syncwarp();
    if (lane_of() == 0) store_release(flags_ + tile_, flag);
  }

  uint32_t* flags_;
  R *elements_, *carries_;
  int64_t tile_;
};

// One launch of a tiled path: publishes what a tile does to a state, walks through it, or both.
enum class Pass { kSummarize, kWalk, kBoth };

// A tile, by all threads of a block of kTileWarps warps.
template <typename Recurrence>
__device__ __forceinline__ void tile_scan(Recurrence& r, const Sequences& s, const bool* reset, bool adjoint,
                                          const Place& place, const Cut& cut, void* workspace, Pass pass) {
  constexpr int kTokens = Recurrence::kTokens;
  using Element = typename Recurrence::Element;
  using Carry = typename Recurrence::Carry;
  auto& shared = shared_memory<TileShared<Recurrence>>();
  const int warp = warp_of(), lane = lane_of();
  const int64_t tau = (place.tile * kTileWarps + warp) * kTokens;

  Timeline<kTokens> time(s, reset, adjoint, place.b);
  r.fetch(tau), time.fetch(tau);
  typename Recurrence::Tokens x = r.take();
  const Facts facts = time.take(tau);

  // From the last token on that starts anew.
  const int start = facts.fresh ? 31 - __clz(static_cast<int>(facts.fresh)) : 0;
  if (facts.fresh) {
    Carry carry = entering(r, time, facts, tau, start);
    for_tokens<Recurrence>(start, facts.count, [&](int i) {
      if (!(facts.padding >> i & 1u)) r.advance(carry, x, i);
    });
    shared.carry[warp][lane] = carry;
  } else {
    Element element = r.identity();
    for_tokens<Recurrence>(0, facts.count, [&](int i) { r.extend(element, x, i); });
    shared.element[warp][lane] = element;
  }
  if (lane == 0) shared.known[warp] = facts.fresh != 0;
  __syncthreads();

  if (warp == 0) {
    int last = kTileWarps - 1;  // the last warp whose leaving state is known, -1: none
    while (last >= 0 && !shared.known[last]) --last;
    Board<Recurrence> board(cut, workspace, place);
    Element element = r.identity();
    Carry carry{};
    if (last >= 0) carry = shared.carry[last][lane];
    if (pass != Pass::kWalk && cut.tiles > 1) {
#pragma unroll 1
      for (int w = last + 1; w < kTileWarps; ++w) {
        if (last >= 0)
          carry = r.apply(shared.element[w][lane], carry);
        else
          element = r.compose(shared.element[w][lane], element);
      }
      last >= 0 ? board.publish_carry(carry) : board.publish_element(element);
    }
    if (pass != Pass::kSummarize && !(facts.fresh & 1u)) {
      const Carry enters = board.look_back(r);
      if (pass == Pass::kBoth && last < 0) board.publish_carry(r.apply(element, enters));
      shared.entering[lane] = enters;
    }
  }
  if (pass == Pass::kSummarize) return;
  __syncthreads();

  Carry carry = shared.entering[lane];
#pragma unroll 1
  for (int w = 0; w < warp; ++w) {
    carry = shared.known[w] ? shared.carry[w][lane] : r.apply(shared.element[w][lane], carry);
  }
  walk(r, time, facts, tau, x, carry);
  r.store(x, tau);
}

// The launches of a scan on its path: serial(), or tile(pass), with clear() before tiles look back.
template <typename Serial, typename Tile, typename Clear>
void run_path(const Cut& cut, const Serial& serial, const Tile& tile, const Clear& clear) {
  switch (cut.path) {
    case Path::kSerial:
      return serial();
    case Path::kTwoPass:
      if (cut.tiles > 1) tile(Pass::kSummarize);
      return tile(Pass::kWalk);
    case Path::kLookBack:
      clear();
      return tile(Pass::kBoth);
  }
}

// Clears the flags, by a grid of threads.
__device__ __forceinline__ void clear_flags(const Cut& cut, void* workspace) {
  const int64_t i = global_thread();
  if (i < cut.blocks) store(static_cast<uint32_t*>(workspace) + i, 0u);
}

// `to` (sequences.count, columns), or number `number` of several such, of a sequence without tokens: `from`, or
// `absent` where there is none. By a grid of sequences.count x columns threads.
__device__ __forceinline__ void pass_states(const Sequences& s, int64_t columns, const Array& from, const Array& to,
                                            float absent, int64_t number = 0) {
  const auto [row, column] = divide(global_thread(), columns);
  if (row >= s.count) return;
  const Span span = span_of_state(s, row, true, 0);
  if (span.begin < span.end) return;
  const int64_t i = number * s.count * columns + global_thread();
  visit(to, [&]<typename T>(T* data) { store(data + i, from ? load<T>(from, i) : static_cast<T>(absent)); });
}

}  // namespace seqkern::time_scan

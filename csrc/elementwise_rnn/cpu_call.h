// What the CPU kernels share: where the numbers of a call lie, and how they come to a thread and leave it. Internal to
// cpu.cpp.
//
// A thread takes a block of channels through time, tile by tile of a few tokens. In whatever it holds for itself
// channels are padded to whole vectors of accumulators; tokens of a block that has no whole vectors go through such
// tiles as well, so the loops over cells have no rests.
#pragma once
#include "common/rows.h"
#include "common/runs.h"
#include "elementwise_rnn/cells.h"
#include "elementwise_rnn/cpu_plan.h"

namespace seqkern::elementwise_rnn {
namespace {

// body.template operator()<C, A>() with the cell of a call, of vectors of A.
template <class Body>
inline void visit_cell(Cell cell, DType accumulator, const Body& body) {
  const auto visit = [&]<class A>() {
    using V = Vec<A>;
    switch (cell) {
      case Cell::kGru:
        return body.template operator()<Gru<V>, A>();
      case Cell::kLstm:
        return body.template operator()<Lstm<V>, A>();
      case Cell::kSlstm:
        return body.template operator()<Slstm<V>, A>();
      case Cell::kIndRnn:
        return body.template operator()<IndRnn<V>, A>();
      case Cell::kElman:
        return body.template operator()<Elman<V>, A>();
    }
  };
  accumulator == DType::kFloat64 ? visit.template operator()<double>() : visit.template operator()<float>();
}

// Neighbouring channels: [first, first + count).
struct Block {
  int64_t first, count;
};

// Rows of numbers of a block's channels: of each token, of each gate or number of a state.
template <class A>
struct Tile {
  A* data;
  int64_t token, part;  // elements to the next

  A* at(int64_t t, int64_t i = 0) const { return data + t * token + i * part; }
};

// A vector of each of kCount rows.
template <class T, int kCount>
[[gnu::always_inline]] inline void load_vectors(const T* rows, int64_t pitch, Vec<Accumulator<T>> (&to)[kCount]) {
  for (int i = 0; i < kCount; ++i) to[i] = load<Accumulator<T>>(rows + i * pitch);
}
template <class A, int kCount>
[[gnu::always_inline]] inline void store_vectors(const Vec<A> (&from)[kCount], A* rows, int64_t pitch) {
  for (int i = 0; i < kCount; ++i) store<A>(rows + i * pitch, from[i]);
}

// (tokens, parts) rows of `count` channels in memory, and whole vectors in scratch.
template <class A, class T>
[[gnu::noinline]] inline void load_rows(const Tile<T>& from, int64_t tokens, int parts, int64_t count,
                                        const Tile<A>& to) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int i = 0; i < parts; ++i)
      for (int64_t d = 0; d < count; d += kLanes<A>)
        store<A>(to.at(t, i) + d, load<A>(from.at(t, i) + d, static_cast<int>(at_most(kLanes<A>, count - d))));
}
// Where `marked` is given, only the channels in which it is not 0 are written.
template <class A, class T>
[[gnu::noinline]] inline void store_rows(const Tile<A>& from, int64_t tokens, int parts, int64_t count,
                                         const Tile<T>& to, const A* marked = nullptr) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int i = 0; i < parts; ++i)
      for (int64_t d = 0; d < count; d += kLanes<A>) {
        const int lanes = static_cast<int>(at_most(kLanes<A>, count - d));
        T* const row = to.at(t, i) + d;
        Vec<A> x = load<A>(from.at(t, i) + d);
        if (marked) x = select(load<A>(marked + d) != 0, x, load<A>(row, lanes));
        store<A>(row, x, lanes);
      }
}

// body.template operator()<T>() with an element type of tokens that are summed in A.
template <class A, class Body>
inline void visit_data(DType dtype, const Body& body) {
  if constexpr (kSame<A, double>) return body.template operator()<double>();
  if constexpr (kSame<A, float>) {
    if (dtype == DType::kBFloat16) return body.template operator()<BFloat16>();
    if (dtype == DType::kFloat16) return body.template operator()<Half>();
    return body.template operator()<float>();
  }
}

// Channels of a block: as many vectors as hide the latency of a cell where they are few, and long rows where they are
// many; in either case enough blocks to keep all threads busy to the end.
template <class A>
inline int64_t channels_of_block(const Inputs& in) {
  constexpr int64_t kHiding = 4, kMost = 2048 / kLanes<A>;  // vectors
  const int64_t vectors = at_least(1, ceil_div(in.channels, kLanes<A>)), threads = num_threads();
  const int64_t runs = at_least(1, in.sequences.batch * in.sequences.length / at_least(1, longest_run(in)));
  const int64_t blocks = runs % threads == 0 ? 1 : ceil_div(4 * threads, runs);
  const int64_t hiding = at_most(kHiding, ceil_div(vectors * runs, threads));
  return kLanes<A> * at_most(kMost, at_least(hiding, ceil_div(vectors, blocks)));
}

// A tensor (B, L, D) as one with a single gate.
inline GateData one_gate(const Data& x) {
  return {x.data, x.dtype, x.stride.b, x.stride.l, 0};
}

// Tokens of a row are counted in processing order: position q is token q, or L - 1 - q with `reverse`.
template <class C, class A_>
struct Call {
  using A = A_;
  using V = Vec<A>;
  static constexpr int kG = C::kGates, kW = C::kWeights, kS = C::kStates;

  const Inputs& in;
  const int64_t width;  // channels of a block, whole vectors: from one row in scratch memory to the next
  const int64_t L = in.sequences.length;

  Call(const Inputs& inputs, int64_t width) : in(inputs), width(width) {}

  int64_t num_blocks() const { return ceil_div(in.channels, width); }
  Block block(int64_t i) const { return {i * width, at_most(width, in.channels - i * width)}; }

  // ---- time

  int64_t first(const Run& run) const { return in.sequences.reverse ? L - run.end : run.begin; }
  int64_t last(const Run& run) const { return first(run) + run.end - run.begin; }  // exclusive
  // The piece that a position is in, and its positions: see kKept.
  int64_t piece(int64_t q) const { return (L - 1 - q) / kKept; }
  int64_t first_of_piece(int64_t j) const { return at_least(0, L - kKept * (j + 1)); }
  int64_t last_of_piece(int64_t j) const { return L - kKept * j; }

  // ---- tokens of row b from position q on

  // (tokens, gates, block)
  template <class T>
  Tile<T> in_memory(const GateData& x, int64_t b, int64_t q, const Block& block) const {
    const int64_t token = in.sequences.reverse ? L - 1 - q : q;
    return {static_cast<T*>(x.data) + b * x.b + token * x.l + block.first, in.sequences.reverse ? -x.l : x.l, x.g};
  }
  // (tokens, kRows, width)
  template <int kRows>
  Tile<A> in_scratch(A* scratch) const {
    return {scratch, kRows * width, width};
  }
  bool has_whole_vectors(const Block& block) const { return block.count % kLanes<A> == 0; }

  // Where it lies, or converted into scratch.
  template <int kRows>
  Tile<const A> load_tile(const GateData& x, int64_t b, int64_t q, int64_t tokens, const Block& block,
                          A* scratch) const {
    if (is_in_place(x.dtype, block)) return in_memory<const A>(x, b, q, block);
    const Tile<A> tile = in_scratch<kRows>(scratch);
    visit_data<A>(x.dtype,
                  [&]<class T>() { load_rows(in_memory<const T>(x, b, q, block), tokens, kRows, block.count, tile); });
    return {tile.data, tile.token, tile.part};
  }
  // A tile to write, and then to call store_tile() with.
  template <int kRows>
  Tile<A> tile_of(const GateData& y, int64_t b, int64_t q, const Block& block, A* scratch) const {
    return is_in_place(y.dtype, block) ? in_memory<A>(y, b, q, block) : in_scratch<kRows>(scratch);
  }
  // From scratch to where it belongs, unless it lies there; of `marked` channels only, where those are given.
  template <int kRows>
  void store_tile(const Tile<A>& tile, const GateData& y, int64_t b, int64_t q, int64_t tokens, const Block& block,
                  const A* marked = nullptr) const {
    visit_data<A>(y.dtype, [&]<class T>() {
      const Tile<T> to = in_memory<T>(y, b, q, block);
      if constexpr (kSame<T, A>)
        if (tile.data == to.data) return;
      store_rows(tile, tokens, kRows, block.count, to, marked);
    });
  }

  // ---- weights (kW, width) and states (kS, width)

  void load_weights(const Block& block, A* w) const {
    visit_dtype(in.weights.dtype, [&]<class T>() {
      const Tile<const T> from{static_cast<const T*>(in.weights.data) + block.first, 0, in.channels};
      load_rows(from, 1, kW, block.count, in_scratch<kW>(w));
    });
  }

  // What enters a run.
  void load_initial_state(const Run& run, const Block& block, A* s) const {
    if (in.initial_state && run.initial >= 0)
      load_state(in.initial_state, in.sequences.count, run.initial, block, s);
    else
      set_empty(s);
  }
  void set_empty(A* s) const {
    V empty[kS];
    C::empty(empty);
    for (int64_t d = 0; d < width; d += kLanes<A>) store_vectors<A>(empty, s + d, width);
  }

  // A row of (kS, rows, D).
  void load_state(const Array& state, int64_t rows, int64_t row, const Block& block, A* s) const {
    visit_dtype(state.dtype, [&]<class T>() {
      load_rows(state_row<const T>(state, rows, row, block), 1, kS, block.count, in_scratch<kS>(s));
    });
  }
  void store_state(A* s, const Array& state, int64_t rows, int64_t row, const Block& block,
                   const A* marked = nullptr) const {
    visit_dtype(state.dtype, [&]<class T>() {
      store_rows(in_scratch<kS>(s), 1, kS, block.count, state_row<T>(state, rows, row, block), marked);
    });
  }
  // Of (kS, B, pieces, D).
  void load_checkpoint(const Array& checkpoints, int64_t b, int64_t j, const Block& block, A* s) const {
    const int64_t pieces = num_pieces(in);
    load_state(checkpoints, in.sequences.batch * pieces, b * pieces + j, block, s);
  }
  void store_checkpoint(A* s, const Array& checkpoints, int64_t b, int64_t j, const Block& block,
                        const A* marked = nullptr) const {
    const int64_t pieces = num_pieces(in);
    store_state(s, checkpoints, in.sequences.batch * pieces, b * pieces + j, block, marked);
  }

 private:
  bool is_in_place(DType dtype, const Block& block) const {
    return dtype == in.accumulator && has_whole_vectors(block);
  }
  template <class T>
  Tile<T> state_row(const Array& state, int64_t rows, int64_t row, const Block& block) const {
    return {static_cast<T*>(state.data) + row * in.channels + block.first, 0, rows * in.channels};
  }
};

}  // namespace
}  // namespace seqkern::elementwise_rnn

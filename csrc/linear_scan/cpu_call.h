// Where the numbers of a call lie, and what a thread holds for itself. Internal to cpu.cpp.
#pragma once
#include "common/parallel.h"
#include "linear_scan/cpu_plan.h"
#include "linear_scan/cpu_rows.h"

namespace seqkern::linear_scan {
namespace {

// Tokens [begin, end) of a run.
struct Piece {
  const Run* run;
  int64_t index, begin, end;

  // Of the run, where tokens are taken from its end if `down`.
  bool is_first(bool down) const { return down ? end == run->end : begin == run->begin; }
  bool is_last(bool down) const { return is_first(!down); }
};

// Neighbouring channels: elements [first, first + elements) of every row.
struct Block {
  int64_t first, elements;
};

// Elements that a thread holds in its first-level cache: of a tile, and of a row.
constexpr int64_t kTileElements = 4096;
// Long rows of 16-bit data come from memory half as fast again one by one.
constexpr int64_t kLongHalfRow = 128;
constexpr int64_t kRowElements = 2048;
// Tokens of a piece whose gradients are summed first; tiles do not cross chunks.
constexpr int64_t kChunk = 64;
// Threads are worth waking for this many elements.
constexpr int64_t kGrain = 1 << 15;

// body.template operator()<T>() with the element type of a call that sums in A.
template <class A, class Body>
inline void visit_data(DType dtype, const Body& body) {
  if constexpr (kSame<A, double>) return body.template operator()<double>();
  if constexpr (kSame<A, float>) {
    if (dtype == DType::kBFloat16) return body.template operator()<BFloat16>();
    if (dtype == DType::kFloat16) return body.template operator()<Half>();
    return body.template operator()<float>();
  }
}

// What a thread holds: rows and tiles of rows `pitch` apart.
template <class F>
struct Workspace {
  using A = typename F::A;

  Workspace(int64_t pitch, int64_t tile_elements, bool prepares_decays, bool has_gradient)
      : pitch(pitch),
        tile_tokens(tokens_of_tile(pitch, tile_elements)),
        scratch_((has_gradient ? 4 : 2) * Scratch::bytes_of<A>(pitch) +
                 (prepares_decays + has_gradient) * Scratch::bytes_of<A>(tile_tokens * pitch)) {
    carry = scratch_.take<A>(pitch), spare = scratch_.take<A>(pitch);
    if (prepares_decays) decays = scratch_.take<A>(tile_tokens * pitch);
    if (!has_gradient) return;
    gradients = scratch_.take<A>(tile_tokens * pitch);
    sums = scratch_.take<A>(pitch), chunk_sums = scratch_.take<A>(pitch);
  }

  const int64_t pitch, tile_tokens;
  A *carry, *spare;                          // carry: the state, or the adjoint's c
  A* decays = nullptr;                       // a tile
  int64_t decays_b = -1, decays_first = -1;  // batch row and channel of decays that are constant in time
  A* gradients = nullptr;                    // a tile
  A *sums = nullptr, *chunk_sums = nullptr;  // of gradients over time

 private:
  static int64_t tokens_of_tile(int64_t pitch, int64_t tile_elements) {
    int64_t tokens = kChunk;
    while (tokens > 1 && tokens * pitch > tile_elements) tokens /= 2;
    return tokens;
  }
  Scratch scratch_;
};

template <class F>
struct Call {
  using A = typename F::A;
  static constexpr int64_t kUnit = F::kUnit;

  const Inputs& in;
  const int64_t elements = row_elements(in);

  explicit Call(const Inputs& inputs) : in(inputs) {}

  // From the i-th token of a piece on, taken from its end if `down`.
  template <class T>
  Rows<T> rows(const Data& x, const Piece& piece, bool down, int64_t i, const Block& block) const {
    const int64_t token = down ? piece.end - 1 - i : piece.begin + i;
    const bool by_channel = is_by_channel(x);
    const int64_t offset = (piece.run->b * x.stride.b + token * x.stride.l) * in.parts();
    return {static_cast<T*>(x.data) + offset + (by_channel ? block.first : 0),
            (down ? -x.stride.l : x.stride.l) * in.parts(), by_channel ? kUnit : 0};
  }
  bool is_by_channel(const Data& x) const { return x.stride.d != 0 || in.channels == 1; }

  bool are_decays_in_place() const { return !in.log_space && is_by_channel(in.a); }

  // [decay] Read where they lie, or prepared in a tile.
  template <class TA>
  Rows<const TA> decays(const Piece& piece, bool down, int64_t i, const Extent& extent, const Block& block,
                        Workspace<F>& w) const {
    if (are_decays_in_place() && (!kSame<TA, A> || in.a.dtype == in.accumulator))
      return rows<const TA>(in.a, piece, down, i, block);
    if constexpr (kSame<TA, A>) {
      const int64_t unit = is_by_channel(in.a) ? kUnit : 0;
      const bool constant = in.a.stride.l == 0;
      const Rows<A> to{w.decays, constant ? 0 : unit ? w.pitch : kUnit, unit};
      const int64_t b = in.a.stride.b == 0 ? 0 : piece.run->b;
      if (!constant || w.decays_b != b || w.decays_first != block.first) {
        visit_dtype(in.a.dtype, [&]<class T>() {
          load_decays<F, T>({constant ? 1 : extent.tokens, extent.elements}, rows<const T>(in.a, piece, down, i, block),
                            in.log_space, to);
        });
        w.decays_b = b, w.decays_first = block.first;
      }
      return {to.data, to.step, to.unit};
    } else {
      return {};
    }
  }

  // A row of a state; absent: zeros.
  void load_state(const Array& state, int64_t row, const Block& block, A* to) const {
    const Extent extent{1, block.elements};
    if (!state || row < 0)
      return for_each_unit<F>(extent, [&](int64_t u, auto) { F::put(to + u * kUnit, typename F::Number{}); });
    visit_dtype(state.dtype, [&]<class T>() {
      const T* const from = static_cast<const T*>(state.data) + row * elements + block.first;
      for_each_unit<F>(extent, [&](int64_t u, auto size) { F::put(to + u * kUnit, F::load(from + u * kUnit, size)); });
    });
  }
  void store_state(const A* from, const Array& state, int64_t row, const Block& block) const {
    if (!state || row < 0) return;
    visit_dtype(state.dtype, [&]<class T>() {
      T* const to = static_cast<T*>(state.data) + row * elements + block.first;
      for_each_unit<F>({1, block.elements},
                       [&](int64_t u, auto size) { F::store(to + u * kUnit, F::get(from + u * kUnit), size); });
    });
  }
};

}  // namespace
}  // namespace seqkern::linear_scan

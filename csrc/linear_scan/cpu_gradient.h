// [da] The gradient of the decays: written where it lies, or through a tile that is converted, or summed over the
// dimensions where decays are constant. Sums are made in an order that sizes fix, not threads. Internal to cpu.cpp.
#pragma once
#include "common/parallel.h"
#include "linear_scan/cpu_call.h"

namespace seqkern::linear_scan {
namespace {

template <class F>
struct DecayGradient : Call<F> {
  using A = typename F::A;
  using Number = typename F::Number;
  using Call<F>::in;
  using Call<F>::kUnit;

  const BwdParams& p;
  A* const partials;  // (sums.rows, sums.columns)
  const DecaySums sums = decay_sums(p);
  const bool down = !in.sequences.reverse;
  const bool only_batch = sums.batch && !sums.time && !sums.channels;

  DecayGradient(const BwdParams& params, A* partials) : Call<F>(params), p(params), partials(partials) {}

  // Blocks of channels are made of so many elements.
  int64_t elements_of_block() const { return sums.channels ? kSumBlock * F::kParts : kUnit; }

  // h of the tokens before those of a tile.
  template <class TX>
  Rows<const TX> h_before(const Piece& piece, int64_t i, const Block& block) const {
    return this->template rows<const TX>(p.h, piece, down, i + 1, block);
  }
  // What the run starts from, as a row of h.
  template <class TX>
  Rows<const TX> state_before(const Run& run, const Block& block, Workspace<F>& w) const {
    this->load_state(in.initial_state, run.initial, block, w.gradients);
    TX* const row = reinterpret_cast<TX*>(w.spare);
    for (int64_t i = 0; i < block.elements; i += kUnit) F::store(row + i, F::get(w.gradients + i));
    return {row, 0, kUnit};
  }

  // Where the tile's kernel, which reads decays as TA, writes.
  template <class TA>
  Rows<TA> target(const Piece& piece, int64_t i, const Block& block, Workspace<F>& w) const {
    if (writes_in_place<TA>()) return this->template rows<TA>(p.da, piece, down, i, block);
    if constexpr (kSame<TA, A>)
      return only_batch ? partial_rows(piece, i, block) : Rows<A>{w.gradients, w.pitch, kUnit};
    return {};
  }
  template <class TA>
  bool writes_in_place() const {
    return !sums.any() && (!kSame<TA, A> || p.da.dtype == in.accumulator);
  }

  void begin_piece(const Block& block, Workspace<F>& w) const {
    if (!sums.time) return;
    clear(w.sums, block), clear(w.chunk_sums, block);
  }

  template <class TA>
  void finish_tile(const Piece& piece, int64_t i, const Extent& extent, const Block& block, Workspace<F>& w) const {
    if (writes_in_place<TA>() || only_batch) return;
    const Rows<const A> tile{w.gradients, w.pitch, kUnit};
    if (!sums.any()) {
      visit_dtype(p.da.dtype, [&]<class T>() {
        convert_rows<F>(extent, tile, this->template rows<T>(p.da, piece, down, i, block));
      });
    } else if (sums.time) {
      for (int64_t d = 0; d < extent.elements; d += kUnit) {
        Number sum = F::load(w.chunk_sums + d);
        for (int64_t t = 0; t < extent.tokens; ++t) sum = sum + F::load(tile.at(t, 0) + d);
        F::store(w.chunk_sums + d, sum);
      }
      if ((i + extent.tokens) % kChunk == 0) finish_chunk(block, w);
    } else {
      for (int64_t t = 0; t < extent.tokens; ++t)
        store_sum_over_channels(tile.at(t, 0), block, partials + token_row(piece, i + t) * sums.columns);
    }
  }

  // Sums of sums err less than one long sum.
  static void finish_chunk(const Block& block, Workspace<F>& w) {
    for (int64_t i = 0; i < block.elements; i += kUnit)
      F::store(w.sums + i, F::load(w.sums + i) + F::load(w.chunk_sums + i));
    clear(w.chunk_sums, block);
  }

  void finish_piece(const Piece& piece, const Block& block, Workspace<F>& w) const {
    if (!sums.time) return;
    finish_chunk(block, w);
    A* const row = partials + piece.index * sums.columns;
    if (sums.channels) return store_sum_over_channels(w.sums, block, row);
    convert_rows<F>({1, block.elements}, Rows<const A>{w.sums, 0, kUnit}, Rows<A>{row + block.first, 0, kUnit});
  }

  void clear_tile(const Piece& piece, int64_t i, const Extent& extent, const Block& block, Workspace<F>& w) const {
    if (only_batch) return clear_rows<F>(extent, partial_rows(piece, i, block));
    if (!sums.any())
      return visit_dtype(
          p.da.dtype, [&]<class T>() { clear_rows<F>(extent, this->template rows<T>(p.da, piece, down, i, block)); });
    clear_rows<F>(extent, Rows<A>{w.gradients, w.pitch, kUnit});
    finish_tile<A>(piece, i, extent, block, w);
  }

  // Adds partial sums, and writes what is asked for.
  void reduce() const {
    if (!sums.any()) return;
    const int64_t L = sums.time ? 1 : in.sequences.length, rows = (sums.batch ? 1 : in.sequences.batch) * L;
    const int64_t strips = sums.channels ? 1 : ceil_div(sums.columns, kStrip);
    parallel_for(0, rows * strips, 64, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / strips / L, l = item / strips % L;
        const PartialRows of(sums, *this, b, l);
        A out[kStrip] = {};
        if (sums.channels) {
          for (int64_t c = 0; c < sums.columns; c += kStrip) {
            A strip[kStrip];
            const int64_t count = at_most(kStrip, sums.columns - c);
            add_rows(of, c, count, strip);
            for (int64_t k = 0; k < count; ++k) out[k % F::kParts] += strip[k];
          }
          store_strip(b, l, 0, F::kParts, out);
        } else {
          const int64_t c = item % strips * kStrip, count = at_most(kStrip, sums.columns - c);
          add_rows(of, c, count, out);
          store_strip(b, l, c, count, out);
        }
      }
    });
  }

 private:
  static constexpr int64_t kStrip = 64;

  static void clear(A* p, const Block& block) {
    for (int64_t i = 0; i < block.elements; i += kUnit) F::store(p + i, Number{});
  }

  int64_t token_row(const Piece& piece, int64_t i) const {
    return piece.run->b * in.sequences.length + (down ? piece.end - 1 - i : piece.begin + i);
  }
  Rows<A> partial_rows(const Piece& piece, int64_t i, const Block& block) const {
    return {partials + token_row(piece, i) * sums.columns + block.first, down ? -sums.columns : sums.columns, kUnit};
  }

  void store_sum_over_channels(const A* numbers, const Block& block, A* row) const {
    constexpr int64_t kElements = kSumBlock * F::kParts;
    A* to = row + block.first / kElements * F::kParts;
    for (int64_t first = 0; first < block.elements; first += kElements, to += F::kParts) {
      Number sum{};
      for_each_unit<F>({1, at_most(kElements, block.elements - first)},
                       [&](int64_t u, auto size) { sum = sum + F::load(numbers + first + u * kUnit, size); });
      F::store_sum(to, sum);
    }
  }

  // The rows of partial sums that make up a number of da.
  struct PartialRows {
    int64_t first, count, step;

    PartialRows(const DecaySums& sums, const DecayGradient& of, int64_t b, int64_t l) {
      const Sequences& s = of.in.sequences;
      if (sums.time)
        first = sums.batch ? 0 : of.first_piece(b), count = (sums.batch ? sums.rows : of.first_piece(b + 1)) - first,
        step = 1;
      else if (sums.batch)
        first = l, count = s.batch, step = s.length;
      else
        first = b * s.length + l, count = 1, step = 1;
    }
  };

  // Of batch row b.
  int64_t first_piece(int64_t b) const {
    if (!is_cut(in)) {
      int64_t low = 0, high = in.num_runs;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        (in.runs[middle].b < b ? low : high) = in.runs[middle].b < b ? middle + 1 : middle;
      }
      return low;
    }
    int64_t count = 0;
    for (int64_t r = 0; r < in.num_runs && in.runs[r].b < b; ++r) count += pieces_of_run(in, in.runs[r], true);
    return count;
  }

  void add_rows(const PartialRows& rows, int64_t column, int64_t count, A* to) const {
    for (int64_t k = 0; k < count; ++k) to[k] = 0;
    for (int64_t i = 0; i < rows.count; i += kStrip) {
      A part[kStrip] = {};
      for (int64_t j = i; j < at_most(rows.count, i + kStrip); ++j) {
        const A* const row = partials + (rows.first + j * rows.step) * sums.columns + column;
        for (int64_t k = 0; k < count; ++k) part[k] += row[k];
      }
      for (int64_t k = 0; k < count; ++k) to[k] += part[k];
    }
  }
  void store_strip(int64_t b, int64_t l, int64_t column, int64_t count, const A* from) const {
    visit_dtype(p.da.dtype, [&]<class T>() {
      T* const to = static_cast<T*>(p.da.data) + (b * p.da.stride.b + l * p.da.stride.l) * F::kParts + column;
      for (int64_t k = 0; k < count; ++k) to[k] = narrow<T>(from[k]);
    });
  }
};

}  // namespace
}  // namespace seqkern::linear_scan

// A scan over the pieces of a call, forwards or adjoint: by blocks of channels that threads share out, or segment by
// segment where time is cut. Internal to cpu.cpp.
#pragma once
#include "linear_scan/cpu_call.h"
#include "linear_scan/cpu_gradient.h"

namespace seqkern::linear_scan {
namespace {

template <class F, bool kAdjoint>
struct Scan : Call<F> {
  using A = typename F::A;
  using Call<F>::in;
  using Call<F>::kUnit;

  const Data x, y;           // b and h, or dh and db
  const Array enter, leave;  // states before and after the tokens, in processing order
  A* const maps;             // (pieces, 3, padded_row): a and b of affine maps, and what enters
  const DecayGradient<F>* const gradient;
  const bool down = in.sequences.reverse != kAdjoint;  // tokens are taken from the last to the first

  Scan(const Inputs& inputs, const Data& x, const Data& y, const Array& enter, const Array& leave, void* maps,
       const DecayGradient<F>* gradient = nullptr)
      : Call<F>(inputs), x(x), y(y), enter(enter), leave(leave), maps(static_cast<A*>(maps)), gradient(gradient) {}

  void run() const {
    if (this->elements == 0) return;
    if (is_cut(in))
      run_segments();
    else
      run_blocks();
  }

  // ---- whole runs

  void run_blocks() const {
    const int64_t tokens = at_least(1, in.sequences.batch * in.sequences.length);
    const int64_t width = width_of_block(tokens), blocks = ceil_div(this->elements, width);
    const auto make = [&] { return make_workspace(width); };
    for_all_runs(in, blocks, kGrain / width + 1, make, [&](int64_t r, int64_t block, Workspace<F>& workspace) {
      const Run& run = in.runs[r];
      const Block channels{block * width, at_most(width, this->elements - block * width)};
      this->load_state(enter, row_entering(run), channels, workspace.carry);
      scan({&run, r, run.begin, run.end}, channels, workspace);
      this->store_state(workspace.carry, leave, row_leaving(run), channels);
    });
  }

  // Wide, so that rows are long; but with enough blocks to keep all threads busy to the end.
  int64_t width_of_block(int64_t tokens) const {
    const int64_t threads = num_threads(), runs = at_least(1, tokens / at_least(1, longest_run(in)));
    const int64_t wanted = runs % threads == 0 ? 1 : ceil_div(4 * threads, runs);
    const int64_t unit = gradient ? gradient->elements_of_block() : kUnit, units = ceil_div(this->elements, unit);
    return ceil_div(units, at_least(wanted, ceil_div(units * unit, kRowElements))) * unit;
  }

  Workspace<F> make_workspace(int64_t pitch) const {
    const bool by_row = size_of(x.dtype) == 2 && pitch >= kLongHalfRow;
    const int64_t tile_elements = by_row ? pitch : kTileElements;
    return Workspace<F>(pitch, tile_elements, !this->are_decays_in_place() || in.a.dtype != in.accumulator,
                        gradient != nullptr);
  }

  int64_t row_entering(const Run& run) const { return kAdjoint ? run.final : run.initial; }
  int64_t row_leaving(const Run& run) const { return kAdjoint ? run.initial : run.final; }

  // The tokens of a piece in processing order; w.carry is what enters, and then what leaves.
  void scan(const Piece& piece, const Block& block, Workspace<F>& w) const {
    visit_types([&]<class TA, class TX>() {
      const int64_t count = piece.end - piece.begin;
      if constexpr (kAdjoint)
        if (gradient) gradient->begin_piece(block, w);
      for (int64_t i = 0, tokens; i < count; i += tokens) {
        tokens = at_most(w.tile_tokens, count - i);
        // The start of a run has no token before it: a tile of its own.
        const bool at_start = kAdjoint && gradient && i + tokens == count && piece.is_last(down);
        if (at_start && tokens > 1) --tokens;
        scan_tile<TA, TX>(piece, i, {tokens, block.elements}, at_start && i + tokens == count, block, w);
      }
      if constexpr (kAdjoint)
        if (gradient) gradient->finish_piece(piece, block, w);
    });
  }

  template <class TA, class TX>
  void scan_tile(const Piece& piece, int64_t i, const Extent& extent, bool at_start, const Block& block,
                 Workspace<F>& w) const {
    const Rows<TX> to = this->template rows<TX>(y, piece, down, i, block);
    if (piece.run->padding) {
      clear_rows<F>(extent, to);
      if constexpr (kAdjoint)
        if (gradient) gradient->clear_tile(piece, i, extent, block, w);
      return;
    }
    const Rows<const TA> a = this->template decays<TA>(piece, down, i, extent, block, w);
    const Rows<const TX> from = this->template rows<const TX>(x, piece, down, i, block);
    if constexpr (kAdjoint) {
      if (gradient) {
        const Rows<const TX> h = at_start ? gradient->template state_before<TX>(*piece.run, block, w)
                                          : gradient->template h_before<TX>(piece, i, block);
        const Rows<TA> da = gradient->template target<TA>(piece, i, block, w);
        differentiate_tile<F>(extent, a, from, to, w.carry, Gradient<TA, TX>{h, da, in.log_space});
        gradient->template finish_tile<TA>(piece, i, extent, block, w);
        return;
      }
    }
    seqkern::linear_scan::scan_tile<F, kAdjoint>(extent, a, from, to, w.carry);
  }

  // Calls body.template operator()<TA, TX>(): decays are read as TA, tokens as TX.
  template <class Body>
  void visit_types(const Body& body) const {
    visit_data<A>(x.dtype, [&]<class TX>() {
      if (sizeof(TX) == 2 && in.a.dtype == x.dtype && this->are_decays_in_place() &&
          !(gradient && gradient->sums.any()))
        body.template operator()<TX, TX>();
      else
        body.template operator()<A, TX>();
    });
  }

  // ---- segments

  // Groups of segments: while one is scanned, the maps of the next are made. Then what enters the next is known.
  void run_segments() const {
    const int64_t count = num_pieces(in), group = num_threads() * kSegmentsPerThread;
    Scratch scratch(Scratch::bytes_of<Piece>(count));
    Piece* const pieces = scratch.take<Piece>(count);
    fill_pieces(pieces);
    const Block all{0, this->elements};
    const int64_t pitch = ceil_div(this->elements, kUnit) * kUnit;
    Workspace<F> own = make_workspace(pitch);
    for (int64_t begin = -group; begin < count; begin += group) {
      parallel_for(0, group, 1, [&](int64_t first, int64_t last) {
        Workspace<F> workspace = make_workspace(pitch);
        for (int64_t i = at_least(0, begin + first); i < at_most(count, begin + last); ++i) {
          const Piece& piece = pieces[i];
          copy(enters(piece), workspace.carry, all);
          scan(piece, all, workspace);
          if (piece.is_last(down)) this->store_state(workspace.carry, leave, row_leaving(*piece.run), all);
        }
        for (int64_t i = begin + group + first; i < at_most(count, begin + group + last); ++i)
          if (!pieces[i].run->padding && !pieces[i].is_last(down)) compose(pieces[i], all, workspace);
      });
      for (int64_t i = begin + group; i < at_most(count, begin + 2 * group); ++i) {
        if (pieces[i].is_first(down))
          this->load_state(enter, row_entering(*pieces[i].run), all, enters(pieces[i]));
        else if (!pieces[i].run->padding)
          chain(pieces[i - 1], all, enters(pieces[i]), own);
      }
    }
  }

  // In processing order.
  void fill_pieces(Piece* pieces) const {
    const int64_t size = segment_tokens(in), total = num_pieces(in);
    int64_t count = 0;
    for (int64_t i = 0; i < in.num_runs; ++i) {
      const Run& run = in.runs[down ? in.num_runs - 1 - i : i];
      const int64_t of_run = pieces_of_run(in, run, true);
      for (int64_t j = 0; j < of_run; ++j, ++count) {
        const int64_t begin = run.begin + (down ? of_run - 1 - j : j) * size;
        pieces[count] = {&run, down ? total - 1 - count : count, begin, at_most(run.end, begin + size)};
      }
    }
  }

  A* map_a(const Piece& piece) const { return maps + piece.index * 3 * padded_row(in); }
  A* map_b(const Piece& piece) const { return map_a(piece) + padded_row(in); }
  A* enters(const Piece& piece) const { return map_b(piece) + padded_row(in); }

  static void copy(const A* from, A* to, const Block& block) {
    for (int64_t i = 0; i < block.elements; i += kUnit) F::put(to + i, F::get(from + i));
  }

  void compose(const Piece& piece, const Block& all, Workspace<F>& w) const {
    for (int64_t i = 0; i < all.elements; i += kUnit) {
      F::put(map_a(piece) + i, F::one());
      F::put(map_b(piece) + i, typename F::Number{});
    }
    compose(piece, all, w, map_a(piece), map_b(piece));
  }
  // After the map h -> a h + b.
  void compose(const Piece& piece, const Block& all, Workspace<F>& w, A* a, A* b) const {
    const FlushSubnormals flush;  // which products of many decays would stay for long, and slow
    visit_data<A>(x.dtype, [&]<class TX>() {
      const int64_t count = piece.end - piece.begin;
      for (int64_t i = 0, tokens; i < count; i += tokens) {
        tokens = at_most(w.tile_tokens, count - i);
        const Extent extent{tokens, all.elements};
        compose_tile<F, kAdjoint>(extent, this->template decays<A>(piece, down, i, extent, all, w),
                                  this->template rows<const TX>(x, piece, down, i, all), a, b);
      }
    });
  }

  // What leaves a piece, from what enters it and its map. That the map overflows, or makes 0 of inf, does not mean that
  // the states do: such channels are scanned.
  void chain(const Piece& piece, const Block& all, A* leaves, Workspace<F>& w) const {
    A not_finite = 0;
    for (int64_t i = 0; i < all.elements; i += kUnit) {
      const Affine<typename F::Number> map{F::get(map_a(piece) + i), F::get(map_b(piece) + i)};
      F::put(leaves + i, apply(map, F::get(enters(piece) + i)));
      for (int64_t k = i; k < i + kUnit; ++k) not_finite += leaves[k] - leaves[k];
    }
    if (not_finite == 0) return;
    copy(enters(piece), w.carry, all);
    copy(map_a(piece), w.spare, all);
    compose(piece, all, w, w.spare, w.carry);
    for (int64_t i = 0; i < all.elements; i += kUnit)
      F::put(leaves + i, where_finite(F::get(leaves + i), F::get(w.carry + i)));
  }

  static constexpr int64_t kSegmentsPerThread = 2;
};

}  // namespace
}  // namespace seqkern::linear_scan

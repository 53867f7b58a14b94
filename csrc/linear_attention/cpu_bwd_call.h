// Where the backward finds and leaves things: units of work, rows of tokens, states. Internal to cpu.cpp.
#pragma once
#include "common/chunk_bwd.h"
#include "linear_attention/cpu_call.h"

namespace seqkern::linear_attention {
namespace {

// Value heads [head, head + heads) of a key head, and chunks [first, first + chunks) of a run: all of it, or a segment.
struct Unit {
  const Run* run;
  int64_t segment;  // counted over all runs
  int64_t first, chunks;
  bool begins;  // with the run
  int64_t key_head, part, head, heads;
};

template <class T>
struct BackwardCall : Call<T> {
  using A = SumOf<T>;
  using Call<T>::in, Call<T>::keys, Call<T>::key_row, Call<T>::group;

  const BwdParams& p;
  const bool normalized = in.normalizer != Normalizer::kNone;
  const int64_t width = in.size + (normalized ? 1 : 0);
  const int64_t value_row = padded<T>(width);
  const int64_t state_size = round_up(width, kWidestVector) * key_row;
  const int64_t parts = parts_of_group(in), most_heads = most_heads_of_part(in);
  const int64_t segment = bwd_segment_tokens(in), segments = num_segments(in, segment);
  const int64_t tokens = in.sequences.batch * in.sequences.length;
  const bool large = tokens * in.value_heads * in.size * size_of(in.v.dtype) >= kLargeBytes;
  const BwdWorkspace sizes = BwdWorkspace(in);
  A* const key_partials = static_cast<A*>(p.workspace);
  A* const head_partials = key_partials + sizes.keys;
  A* const bonus_partials = head_partials + sizes.heads;
  A* const elements = bonus_partials + sizes.bonus;

  explicit BackwardCall(const BwdParams& params) : Call<T>(params), p(params) {}

  // ---- units, counted as (segments, H, parts)

  int64_t num_units() const { return segments * in.heads * parts; }
  Unit unit(int64_t i) const {
    const int64_t index = i / parts / in.heads;
    int64_t r = segment == 0 ? index : 0, first = segment == 0 ? 0 : index;
    for (; segment > 0 && first >= segments_of_run(in.runs[r], segment); ++r)
      first -= segments_of_run(in.runs[r], segment);
    const Run& run = in.runs[r];
    const int64_t all = num_chunks(run), of_segment = segment == 0 || run.padding ? all : segment / kChunk;
    first *= of_segment;
    const int64_t chunks = at_most(of_segment, all - first);
    const int64_t part = i % parts, key_head = i / parts % in.heads;
    const int64_t head = part * group / parts, heads = (part + 1) * group / parts - head;
    return {&run, index, first, chunks, first == 0, key_head, part, key_head * group + head, heads};
  }
  static int64_t num_chunks(const Run& run) { return ceil_div(run.end - run.begin, kChunk); }
  static Chunk chunk(const Unit& u, int64_t c) {
    return {u.run, c * kChunk, at_most(kChunk, u.run->end - u.run->begin - c * kChunk)};
  }

  // ---- rows of tokens

  void load_keys(const Data& x, const Chunk& here, int64_t head, const Next& next, A* rows) const {
    this->load_rows(x, here, head, keys, key_row, next, rows);
  }
  void load_values(const Data& x, const Chunk& here, int64_t head, const Next& next, A* rows) const {
    this->load_rows(x, here, head, in.size, value_row, next, rows);
  }
  // With its column of ones.
  void load_v(const Chunk& here, int64_t head, const Next& next, A* v) const {
    load_values(in.v, here, head, next, v);
    for (int64_t j = 0; normalized && j < here.count; ++j) v[j * value_row + in.size] = 1;
  }

  void store_keys(const A* rows, const Data& x, const Chunk& here, int64_t head) const {
    this->store_rows(rows, key_row, x, here, head, keys, large);
  }
  void store_values(const A* rows, const Data& x, const Chunk& here, int64_t head) const {
    this->store_rows(rows, value_row, x, here, head, in.size, large);
  }

  // dq (which = 0) or dk (1) of a unit: the result, or where there are several parts one of its summands.
  Data keys_of_part(int64_t part, int which) const {
    if (parts == 1) return which == 0 ? p.dq : p.dk;
    const int64_t of_token = in.heads * keys;
    return {key_partials + (part * 2 + which) * tokens * of_token, in.accumulator, in.sequences.length * of_token,
            of_token, keys};
  }
  void reduce_keys() const {
    const int64_t of_token = in.heads * keys, count = tokens * of_token;
    parallel_for(0, tokens, kNumbersOfThread / at_least(1, parts * of_token) + 1, [&](int64_t begin, int64_t end) {
      for (int which = 0; which < 2; ++which) {
        const Data& to = which == 0 ? p.dq : p.dk;
        const A* const from = key_partials + which * count;
        visit_dtype(to.dtype, [&]<class X>() {
          X* const x = static_cast<X*>(to.data);
          for (int64_t i = begin * of_token; i < end * of_token; i += kLanes<A>) {
            const int lanes = static_cast<int>(at_most(end * of_token - i, kLanes<A>));
            Vec<A> sum{};
            for (int64_t part = 0; part < parts; ++part) sum += load<A>(from + part * 2 * count + i, lanes);
            store<A>(x + i, sum, lanes);
          }
        });
      }
    });
  }

  // ---- states: S^T (width, key_row), whose last row is z where there is a normalizer

  // And m. Without a state, or with an empty one: zeros. A gradient is never empty.
  void load_state(const State& state, int64_t row, int64_t head, bool gradient, A* S, A* m) const {
    const int64_t index = row * in.value_heads + head;
    clear(S, state_size);
    *m = gradient ? A{0} : kEmpty<A>;
    if (!state || row < 0) return;
    if (state.m) load_array(state.m, index, 1, m);
    if (!gradient && state.m && *m == kEmpty<A>) return;
    visit_dtype(state.S.dtype, [&]<class X>() {
      const X* const from = static_cast<const X*>(state.S.data) + index * keys * in.size;
      if (!in.value_major) return transpose_into<A>(from, in.size, keys, in.size, S, key_row);
      for (int64_t v = 0; v < in.size; ++v) convert(from + v * keys, 1, keys, S + v * key_row);
    });
    if (state.z) load_array(state.z, index * keys, keys, S + in.size * key_row);
  }
  void store_state(const A* S, A m, const State& state, int64_t row, int64_t head) const {
    const int64_t index = row * in.value_heads + head;
    visit_dtype(state.S.dtype, [&]<class X>() {
      X* const to = static_cast<X*>(state.S.data) + index * keys * in.size;
      if (!in.value_major) return transpose_into<A>(S, key_row, in.size, keys, to, in.size);
      for (int64_t v = 0; v < in.size; ++v) convert(S + v * key_row, 1, keys, to + v * keys);
    });
    if (state.z) store_array(S + in.size * key_row, keys, state.z, index * keys);
    if (state.m) store_array(&m, 1, state.m, index);
  }

  // Of a segment and value head, where time is cut. First what the segment makes of nothing: the state that it leaves
  // of an empty one, the gradients that its outputs send back before it, and how it decays what passes through, either
  // way. Then what passes: the state that enters it, and the gradients that come back to it.
  struct Element {
    A *S, *dS;       // S^T, dS^T
    A* decay;        // (key_row)
    A *dm, *passes;  // of the maximum; 1, or 0 if no gradient of a later maximum passes through
  };
  Element element(int64_t index, int64_t head) const {
    A* const S = elements + (index * in.value_heads + head) * sizes.of_element;
    A *const dS = S + sizes.of_state, *const decay = dS + sizes.of_state;
    A* const dm = decay + round_up(keys, kWidestVector);
    return {S, dS, decay, dm, dm + 1};
  }
};

}  // namespace
}  // namespace seqkern::linear_attention

// The forward pass. Internal to cpu.cpp.
#pragma once
#include "common/blocks.h"
#include "linear_attention/cpu_call.h"

namespace seqkern::linear_attention {
namespace {

template <class T>
struct Forward : Call<T> {
  using A = SumOf<T>;
  using Call<T>::in, Call<T>::key_row, Call<T>::per_key;

  const FwdParams& p;
  const int64_t segment = segment_tokens(in);  // tokens, 0: runs are whole
  const Blocks<FwdParams> blocks = Blocks<FwdParams>(p, segment == 0);
  const int64_t units = blocks.units, max_row = padded<T>(blocks.max_values);
  const bool normalized = in.normalizer != Normalizer::kNone;

  explicit Forward(const FwdParams& params) : Call<T>(params), p(params) {}

  // The state of a head.
  struct HeadState {
    A *S, *z, *m;  // (K, padded<T>(values)), (K), one number
  };
  // What a segment makes of any state that enters it: its own from an empty one, and how it decays others.
  struct Element : HeadState {
    A *decay, *sum_f;  // exp(sum of g), one number or (K); the sum of f, of kExp
  };

  struct Arrays {
    A *q, *k, *v, *y;
    A *products, *scores;  // (tokens, kChunk)
    A *sums, *inverse;     // z . q as read, and 1 / d with the scale
    A *bonus, *diagonal, *skip, *gate;
    A *S, *z, *m;  // of all heads of a block
    A *decay, *sum_f;
    TokenGates<A> gates;
    KeyDecays<A> key_gates;
    typename Call<T>::Packed packed;
    T *of_q, *of_q_k, *of_k, *of_v, *of_S, *of_scores;  // operands

    template <class Take>
    void allocate(const Forward& call, const Take& take) {
      const int64_t keys = call.in.keys, key_row = call.key_row, row = call.max_row, heads = call.blocks.max_heads;
      const auto operands = [&](int64_t count) { return Call<T>::take_operands(take, count); };
      q = take(kChunk * key_row), k = take(kChunk * key_row), v = take(kChunk * row), y = take(kChunk * row);
      products = take(kChunk * kChunk), scores = take(kChunk * kChunk);
      sums = take(kChunk), inverse = take(kChunk), diagonal = take(kChunk), bonus = take(key_row), skip = take(row);
      gate = take(call.in.gate ? kChunk * row : 0);
      S = take(heads * round_up(keys, kSubChunk) * row), z = take(heads * key_row), m = take(heads);
      decay = take(key_row), sum_f = take(1);
      gates.allocate(take);
      if (call.per_key) key_gates.allocate(key_row, take), packed.allocate(keys, take);
      of_q = operands(left_room<T>(kChunk, keys)), of_q_k = operands(right_room<T>(keys, kChunk));
      of_k = operands(left_room<T>(keys, kChunk)), of_v = operands(right_room<T>(kChunk, call.blocks.max_values));
      of_S = operands(right_room<T>(keys, call.blocks.max_values)), of_scores = operands(left_room<T>(kChunk, kChunk));
    }

    HeadState state(const Forward& call, int64_t head) const {
      const int64_t rows = round_up(call.in.keys, kSubChunk);
      return {S + head * rows * call.max_row, z + head * call.key_row, m + head};
    }
  };
  struct Workspace : InScratch<A, Arrays> {
    const Multiplier<T> multiplier;
    const FlushSubnormals flush;  // which products of many decays become, and stay for long

    explicit Workspace(const Forward& call) : InScratch<A, Arrays>(call) { clear(this->scores, kChunk * kChunk); }
  };

  void run() const {
    if (segment > 0)
      run_segments();
    else
      blocks.template for_all<Workspace>(*this, [&](const Block& block, const Arrays& a) { scan_run(block, a); });
  }

  void scan_run(const Block& block, const Arrays& a) const {
    const Run& run = *block.run;
    if (run.padding) return clear_outputs(block, a);
    for (int64_t h = 0; h < block.heads; ++h) load_initial(block, h, a);
    scan(block, 0, run.end - run.begin, true, a);
    for (int64_t h = 0; h < block.heads; ++h) store_final(block, h, a);
  }
  void load_initial(const Block& block, int64_t h, const Arrays& a) const {
    const HeadState state = a.state(*this, h);
    this->load_state(in.initial_state, block.run->initial, block.head + h, block.value, block.values, state.S, state.z,
                     state.m);
  }
  void store_final(const Block& block, int64_t h, const Arrays& a) const {
    if (!p.final_state || block.run->final < 0) return;
    const HeadState state = a.state(*this, h);
    this->store_state(state.S, state.z, state.m, block.value, block.values, p.final_state, block.run->final,
                      block.head + h);
  }

  // ---- segments: all elements side by side, then in order the states that enter, then all outputs side by side

  void run_segments() const {
    const int64_t count = num_segments(in) * units, all_units = in.num_runs * units;
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const Workspace arrays(*this);
      for_each_unit(0, all_units, [&](const Block& block, int64_t index, int64_t segments) {
        for (int64_t s = at_least(begin - index, 0); s < at_most(end - index, segments - 1); ++s)
          make_element(block, s, element(index + s), arrays);
      });
    });
    parallel_for(0, all_units, 1, [&](int64_t begin, int64_t end) {
      const Workspace arrays(*this);
      for_each_unit(begin, end, [&](const Block& block, int64_t index, int64_t segments) {
        load_initial(block, 0, arrays);
        for (int64_t s = 0; s + 1 < segments; ++s) enter(block, arrays.state(*this, 0), element(index + s));
        copy_state(block, arrays.state(*this, 0), element(index + segments - 1));
      });
    });
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const Workspace arrays(*this);
      for_each_unit(0, all_units, [&](const Block& block, int64_t index, int64_t segments) {
        for (int64_t s = at_least(begin - index, 0); s < at_most(end - index, segments); ++s) {
          if (block.run->padding) return clear_outputs(block, arrays);
          copy_state(block, element(index + s), arrays.state(*this, 0));
          scan_segment(block, s, true, arrays);
          if (s + 1 == segments) store_final(block, 0, arrays);
        }
      });
    });
  }

  // Calls body(block, index, segments) for units [begin, end) of (runs, HV, parts); index: of its first segment.
  template <class Body>
  void for_each_unit(int64_t begin, int64_t end, const Body& body) const {
    int64_t index = 0;
    for (int64_t r = 0; r < in.num_runs; ++r, begin -= units, end -= units) {
      const int64_t segments = segments_of_run(in.runs[r], segment), first = at_least(begin, 0);
      int64_t unit = first;
      blocks.for_each(in.runs[r], first, at_most(end, units),
                      [&](const Block& block) { body(block, index + unit++ * segments, segments); });
      index += units * segments;
    }
  }

  Element element(int64_t index) const {
    A* const S = static_cast<A*>(p.workspace) + index * elements_of_segment(in);
    A* const z = S + in.keys * blocks.part;
    A* const decay = z + round_up(in.keys, kWidestVector);
    A* const m = decay + round_up(in.keys, kWidestVector);
    return {{S, z, m}, decay, m + 1};
  }
  void scan_segment(const Block& block, int64_t s, bool outputs, const Arrays& a) const {
    scan(block, s * segment, at_most((s + 1) * segment, block.run->end - block.run->begin), outputs, a);
  }
  void copy_state(const Block& block, const HeadState& from, const HeadState& to) const {
    scale_row(A{1}, from.S, in.keys * padded<T>(block.values), to.S);
    scale_row(A{1}, from.z, key_row, to.z);
    *to.m = *from.m;
  }
  void make_element(const Block& block, int64_t s, const Element& to, const Arrays& a) const {
    const HeadState state = a.state(*this, 0);
    clear(state.S, in.keys * padded<T>(block.values)), clear(state.z, key_row);
    *state.m = kEmpty<A>;
    fill(a.decay, key_row, A{1}), *a.sum_f = 0;
    scan_segment(block, s, false, a);
    copy_state(block, state, to);
    scale_row(A{1}, a.decay, key_row, to.decay);
    *to.sum_f = *a.sum_f;
  }
  // [carry] over a segment whose record is its element, and becomes the state that enters it.
  void enter(const Block& block, const HeadState& state, const Element& record) const {
    const int64_t row = padded<T>(block.values);
    A weight = 1;
    if (in.gates.form == Form::kExp) {
      const A kept = *record.sum_f + *state.m, m = kept >= *record.m || kept != kept ? kept : *record.m;
      weight = m == kEmpty<A> ? 0 : exp_of_negative(splat(*record.m - m))[0];
      fill(record.decay, key_row, m == kEmpty<A> ? 0 : exp_of_negative(splat(kept - m))[0]);
      *record.m = *state.m, *state.m = m;
    }
    const auto pass = [&](A decay, A* into, A* own, int64_t count) {
      for (int64_t i = 0; i < count; i += kLanes<A>) {
        const Vec<A> entering = load<A>(into + i);
        store<A>(into + i, madd(splat(decay), entering, weight * load<A>(own + i)));
        store<A>(own + i, entering);
      }
    };
    for (int64_t k = 0; k < in.keys; ++k) pass(record.decay[k], state.S + k * row, record.S + k * row, row);
    for (int64_t k = 0; k < key_row; k += kLanes<A>) {
      const Vec<A> entering = load<A>(state.z + k);
      store<A>(state.z + k, madd(load<A>(record.decay + k), entering, weight * load<A>(record.z + k)));
      store<A>(record.z + k, entering);
    }
  }

  // ---- chunks

  // Tokens [begin, end) of a run in the order of time.
  void scan(const Block& block, int64_t begin, int64_t end, bool outputs, const Arrays& a) const {
    for (int64_t first = begin; first < end; first += kChunk) {
      const Chunk chunk{block.run, first, at_most(kChunk, end - first)};
      Operands operands;
      for (int64_t h = 0; h < block.heads; ++h) {
        const int64_t head = block.head + h;
        this->load_tokens(in.v, chunk, head, block.value, block.values, a.v);
        if (per_key || h == 0 || head % this->group == 0) operands = load_keys(chunk, head / this->group, outputs, a);
        if (per_key)
          scan_with_key_decays(block, chunk, h, outputs, a);
        else
          scan_with_token_decays(block, chunk, h, operands, outputs, a);
      }
    }
  }

  // q (tokens, K) and k^T (K, tokens) of a chunk, where their decays are not in them.
  struct Operands {
    Left<T> q = {}, k = {};
  };
  Operands load_keys(const Chunk& chunk, int64_t key_head, bool outputs, const Arrays& a) const {
    const int64_t count = chunk.count, keys = in.keys;
    Operands operands;
    this->load_tokens(in.k, chunk, key_head, 0, keys, a.k);
    if (!per_key) operands.k = pack_left(a.k, 1, key_row, keys, count, a.of_k);
    if (!outputs) return operands;
    this->load_tokens(in.q, chunk, key_head, 0, keys, a.q);
    if (in.read_previous) {
      this->load_bonus(key_head, a.bonus);
      this->multiply_bonus(a.q, a.k, a.bonus, count, a.diagonal);
    }
    if (per_key) return operands;
    operands.q = pack_left(a.q, key_row, 1, count, keys, a.of_q);
    this->multiply_lower(operands.q, pack_right(a.k, 1, key_row, keys, count, a.of_q_k), a.products, count, keys);
    return operands;
  }

  void scan_with_token_decays(const Block& block, const Chunk& chunk, int64_t h, const Operands& operands, bool outputs,
                              const Arrays& a) const {
    const int64_t count = chunk.count, keys = in.keys, row = padded<T>(block.values);
    const HeadState state = a.state(*this, h);
    const TokenGates<A>& gates = a.gates;
    *gates.m = *state.m;
    this->load_gates(chunk, block.head + h, gates);
    if (outputs) {
      this->decay_scores(gates, count, a.products, a.scores);
      read(block, chunk, h, operands.q, gates.read, a);
    }
    multiply_row(gates.w, gates.left, kChunk, gates.left);
    for (int64_t i = 0; i < count; ++i) scale_row(gates.left[i], a.v + i * row, row, a.v + i * row);
    scale_row(*gates.total, state.S, keys * row, state.S);
    multiply(operands.k, pack_right(a.v, row, 1, count, block.values, a.of_v, true), state.S, row, keys, block.values,
             count, true);  // [carry]
    scale_row(*gates.total, state.z, key_row, state.z);
    if (normalized)
      for (int64_t i = 0; i < count; ++i) add_row(gates.left[i], a.k + i * key_row, key_row, state.z);
    if (in.gates.form == Form::kExp) *state.m = gates.m[count];
    if (outputs) return;
    scale_row(*gates.total, a.decay, key_row, a.decay);
    if (in.gates.form == Form::kExp)
      for (int64_t i = 0; i < count; ++i) *a.sum_f += gates.f[i];
  }

  void scan_with_key_decays(const Block& block, const Chunk& chunk, int64_t h, bool outputs, const Arrays& a) const {
    const int64_t count = chunk.count, keys = in.keys, row = padded<T>(block.values);
    const HeadState state = a.state(*this, h);
    this->load_gates(chunk, block.head + h, a.key_gates);
    if (outputs) {
      this->scores_per_key(a.key_gates, count, in.read_previous, {{a.q, a.scores}}, a.k, a.packed);
      read(block, chunk, h, pack_left(a.q, key_row, 1, count, keys, a.of_q), nullptr, a);
    } else {
      this->keys_to_end(a.key_gates, count, a.k);
    }
    A* const total = a.key_gates.total;  // exp(c_C), the product of all sub-chunks
    for (int64_t i = kSubChunk; i < count; i += kSubChunk)
      multiply_row(total + i / kSubChunk * key_row, total, key_row, total);
    for (int64_t k = 0; k < keys; ++k) scale_row(total[k], state.S + k * row, row, state.S + k * row);
    multiply(pack_left(a.k, 1, key_row, keys, count, a.of_k),
             pack_right(a.v, row, 1, count, block.values, a.of_v, true), state.S, row, keys, block.values, count,
             true);  // [carry]
    multiply_row(total, state.z, key_row, state.z);
    if (normalized)
      for (int64_t i = 0; i < count; ++i) add_row(A{1}, a.k + i * key_row, key_row, state.z);
    if (!outputs) multiply_row(total, a.decay, key_row, a.decay);
  }

  // [chunk] n, from q, the scores and the state that enters the chunk, and what follows from n. `decays`: exp(r_i), if
  // q does not have them yet.
  void read(const Block& block, const Chunk& chunk, int64_t h, Left<T> q, const A* decays, const Arrays& a) const {
    const int64_t count = chunk.count, keys = in.keys, values = block.values, row = padded<T>(values);
    const HeadState state = a.state(*this, h);
    if (in.read_previous)
      for (int64_t i = 0; i < count; ++i) a.scores[i * kChunk + i] = a.diagonal[i];
    multiply(q, pack_right(state.S, row, 1, keys, values, a.of_S, true), a.y, row, count, values, keys, false);
    if (decays)
      for (int64_t i = 0; i < count; ++i) scale_row(decays[i], a.y + i * row, row, a.y + i * row);
    multiply(pack_left(a.scores, kChunk, 1, count, count, a.of_scores),
             pack_right(a.v, row, 1, count, values, a.of_v, true), a.y, row, count, values, count, true, Band::kLower);
    normalize(block, chunk, h, decays, a);
    store_outputs(block, chunk, block.head + h, a);
  }

  // [norm] inverse = scale / d, or 1 / d with kSum. An empty state has exp(-m) = inf: its o is 0.
  void normalize(const Block& block, const Chunk& chunk, int64_t h, const A* decays, const Arrays& a) const {
    const A scale = static_cast<A>(in.scale), eps = static_cast<A>(in.eps);
    if (!normalized) return fill(a.inverse, kChunk, scale);
    const A* const z = a.state(*this, h).z;
    sums_of_rows<A>(chunk.count, a.sums, [&](int64_t i) {
      const Vec<A> sum = dot_lanes(a.q + i * key_row, z, key_row);
      return sum_of_vectors(a.scores + i * kChunk, i + 1, decays ? decays[i] * sum : sum);
    });
    for (int64_t i = 0; i < chunk.count; i += kLanes<A>) {
      const Vec<A> sum = load<A>(a.sums + i);
      if (in.normalizer == Normalizer::kSum) {
        store<A>(a.inverse + i, 1 / (sum + eps));
      } else {
        const Vec<A> scaled = scale * sum, magnitude = scaled < 0 ? -scaled : scaled;
        const Vec<A> floor = exp_of_minus(load<A>(a.gates.m + i + 1));
        store<A>(a.inverse + i, scale / ((magnitude < floor ? floor : magnitude) + eps));
      }
    }
    if (block.value == 0) store_numbers(a.sums, a.gates.m + 1, chunk, block.head + h);
  }
  static Vec<A> sum_of_vectors(const A* x, int64_t count, Vec<A> sum) {
    for (int64_t i = 0; i < count; i += kLanes<A>) sum += load<A>(x + i);
    return sum;
  }
  static Vec<A> exp_of_minus(Vec<A> x) { return x > 0 ? exp_of_negative(-x) : 1 / exp_of_negative(x); }
  void store_numbers(const A* denominators, const A* maxima, const Chunk& chunk, int64_t head) const {
    int64_t to = this->number(chunk, head);
    for (int64_t i = 0; i < chunk.count; ++i, to += this->step * in.value_heads) {
      if (p.denominators) static_cast<A*>(p.denominators)[to] = denominators[i];
      if (p.maxima) static_cast<A*>(p.maxima)[to] = maxima[i];
    }
  }

  // [out] [skip] of n in y.
  void store_outputs(const Block& block, const Chunk& chunk, int64_t head, const Arrays& a) const {
    const int64_t count = chunk.count, values = block.values, row = padded<T>(values);
    for (int64_t i = 0; i < count; ++i) scale_row(a.inverse[i], a.y + i * row, row, a.y + i * row);
    if (p.o) this->store_tokens(a.y, p.o, chunk, head, block.value, values);
    if (in.skip) {
      visit_dtype(in.skip.dtype, [&]<class X>() {
        const X* const D = static_cast<const X*>(in.skip.data) + head * in.skip_h + block.value * in.skip_v;
        convert(D, in.skip_v, values, a.skip);
      });
      for (int64_t i = 0; i < count * row; i += row) add_products(a.skip, a.v + i, row, a.y + i);
    }
    if (in.gate) {
      this->load_tokens(in.gate, chunk, head, block.value, values, a.gate);
      for (int64_t i = 0; i < count * row; i += kLanes<A>)
        store<A>(a.y + i, load<A>(a.y + i) * silu(load<A>(a.gate + i)));
    }
    this->store_tokens(a.y, p.y, chunk, head, block.value, values);
  }

  // Of padding.
  void clear_outputs(const Block& block, const Arrays& a) const {
    const int64_t tokens = block.run->end - block.run->begin;
    clear(a.y, kChunk * padded<T>(block.values)), clear(a.sums, kChunk);
    for (int64_t h = block.head; h < block.head + block.heads; ++h)
      for (int64_t first = 0; first < tokens; first += kChunk) {
        const Chunk chunk{block.run, first, at_most(kChunk, tokens - first)};
        this->store_tokens(a.y, p.y, chunk, h, block.value, block.values);
        if (p.o) this->store_tokens(a.y, p.o, chunk, h, block.value, block.values);
        if (block.value == 0) store_numbers(a.sums, a.sums, chunk, h);
      }
  }
};

}  // namespace
}  // namespace seqkern::linear_attention

// What forward and backward share beside common/chunk.h: the gates and the scores of a chunk, and states. Internal to
// cpu.cpp.
#pragma once
#include "common/chunk.h"
#include "linear_attention/cpu_plan.h"

namespace seqkern::linear_attention {
namespace {

template <class A>
constexpr A kEmpty = -static_cast<A>(__builtin_inf());  // m of an empty state

template <class A>
inline Vec<A> log_sigmoid(Vec<A> x) {
  const Vec<A> zero{}, magnitude = x < 0 ? -x : x;
  return select(x < 0, x, zero) - softplus(-magnitude);
}

// [gate] of a chunk and value head, a number per token.
template <class A>
struct TokenGates : TokenDecays<A> {
  A* w;  // whole vectors, 0 after the last token
  A* f;  // log sigmoid(decay), of kExp
  A* m;  // m[0] enters the chunk, m[t + 1] belongs to token t; of kExp

  template <class Take>
  void allocate(const Take& take) {
    TokenDecays<A>::allocate(take);
    w = take(kChunk), f = take(kChunk), m = take(kChunk + kWidestVector);
  }
};

// T: operands of matrix products.
template <class T>
struct Call : ChunkCall<T> {
  using A = SumOf<T>;
  using ChunkCall<T>::step, ChunkCall<T>::key_row;

  const Inputs& in;
  const bool per_key = in.gates.form == Form::kKey;

  explicit Call(const Inputs& inputs)
      : ChunkCall<T>(inputs.sequences, inputs.heads, inputs.value_heads, inputs.keys), in(inputs) {}

  // In (B, L, HV), contiguous; the next token is at step * HV.
  int64_t number(const Chunk& chunk, int64_t head) const {
    return this->offset({nullptr, in.accumulator, in.sequences.length * in.value_heads, in.value_heads, 1}, chunk,
                        head);
  }

  // [gate] of all forms but kKey; m[0] is what the chunk before has left.
  void load_gates(const Chunk& chunk, int64_t head, const TokenGates<A>& gates) const {
    const Gates& from = in.gates;
    const int64_t count = chunk.count;
    clear(gates.g, kChunk), fill(gates.w, kChunk, A{1});
    if (from.form == Form::kToken) this->load_numbers(from.decay, chunk, head, gates.g);
    if (from.form == Form::kDelta) load_delta(chunk, head, gates);
    if (from.form == Form::kExp) load_exponential(chunk, head, gates);
    for (int64_t i = count; i < round_up(count, kLanes<A>); ++i) gates.g[i] = 0, gates.w[i] = 0;
    gates.accumulate(count, in.read_previous);
  }
  void load_delta(const Chunk& chunk, int64_t head, const TokenGates<A>& gates) const {
    const Gates& from = in.gates;
    A of_head = 0, bias = 0;
    load_array(from.A, head, 1, &of_head);
    if (from.bias) load_array(from.bias, head, 1, &bias);
    const Vec<A> low = splat(static_cast<A>(from.low)), high = splat(static_cast<A>(from.high));
    this->load_numbers(from.decay, chunk, head, gates.w);
    for (int64_t i = 0; i < chunk.count; i += kLanes<A>) {
      Vec<A> delta = load<A>(gates.w + i) + bias;
      if (from.softplus) delta = softplus(delta);
      delta = delta < low ? low : delta > high ? high : delta;  // NaN stays
      store<A>(gates.w + i, delta);
      store<A>(gates.g + i, delta * of_head);
    }
  }
  void load_exponential(const Chunk& chunk, int64_t head, const TokenGates<A>& gates) const {
    this->load_numbers(in.gates.decay, chunk, head, gates.f);
    this->load_numbers(in.gates.input, chunk, head, gates.w);
    for (int64_t i = 0; i < chunk.count; i += kLanes<A>) store<A>(gates.f + i, log_sigmoid<A>(load<A>(gates.f + i)));
    A m = gates.m[0];
    for (int64_t i = 0; i < chunk.count; ++i) {
      const A kept = gates.f[i] + m, input = gates.w[i];
      gates.m[i + 1] = m = kept >= input || kept != kept ? kept : input;
    }
    for (int64_t i = 0; i < chunk.count; i += kLanes<A>) {
      const Vec<A> before = load<A>(gates.m + i), max = load<A>(gates.m + i + 1), zero{};
      const auto empty = max == kEmpty<A>;
      store<A>(gates.g + i, select(empty, max, load<A>(gates.f + i) + before - max));  // forgets what was there
      store<A>(gates.w + i, select(empty, zero, exp_of_negative(load<A>(gates.w + i) - max)));
    }
  }
  void load_gates(const Chunk& chunk, int64_t head, const KeyDecays<A>& decays) const {
    this->load_tokens(in.gates.decay, chunk, head, 0, in.keys, decays.step);
    decays.accumulate(chunk.count, key_row, in.read_previous);
  }

  // [scores] P of products q_i . k_j.
  void decay_scores(const TokenGates<A>& gates, int64_t count, const A* products, A* scores) const {
    for_each_decay(gates.g, count, in.read_previous, [&](int64_t i, int64_t j, Vec<A> decays, auto mask) {
      const Vec<A> weighted = decays * load<A>(gates.w + j) * load<A>(products + i * kChunk + j);
      store<A>(scores + i * kChunk + j, select(mask, weighted, Vec<A>{}));
    });
  }

  // q_i . (bonus * k_i), which read_previous has on the diagonal of [scores].
  void multiply_bonus(const A* q, const A* k, const A* bonus, int64_t count, A* diagonal) const {
    sums_of_rows<A>(count, diagonal, [&](int64_t i) {
      Vec<A> sum{};
      for (int64_t j = 0; j < key_row; j += kLanes<A>)
        sum = madd(load<A>(q + i * key_row + j) * load<A>(bonus + j), load<A>(k + i * key_row + j), sum);
      return sum;
    });
  }
  void load_bonus(int64_t key_head, A* bonus) const {
    clear(bonus, key_row);
    if (in.bonus) load_array(in.bonus, key_head * in.keys, in.keys, bonus);
  }

  // ---- states: S (K, padded<T>(values)) of values [first, first + values), z (key_row), m

  // Row -1: an empty state.
  void load_state(const State& state, int64_t row, int64_t head, int64_t first, int64_t values, A* S, A* z,
                  A* m) const {
    const int64_t keys = in.keys, index = row * in.value_heads + head, to_row = padded<T>(values);
    clear(S, keys * to_row), clear(z, key_row);
    *m = kEmpty<A>;
    if (!state || row < 0) return;
    if (state.m) load_array(state.m, index, 1, m);
    if (state.m && *m == kEmpty<A>) return;  // whatever S and z hold
    if (in.value_major)
      visit_dtype(state.S.dtype, [&]<class X>() {
        const X* const from = static_cast<const X*>(state.S.data) + (index * in.size + first) * keys;
        transpose_into<A>(from, keys, values, keys, S, to_row);
      });
    else
      ChunkCall<T>::load_state(state.S, index, in.size, first, values, S);
    if (state.z) load_array(state.z, index * keys, keys, z);
  }
  void store_state(const A* S, const A* z, const A* m, int64_t first, int64_t values, const State& state, int64_t row,
                   int64_t head) const {
    const int64_t keys = in.keys, index = row * in.value_heads + head;
    if (in.value_major)
      visit_dtype(state.S.dtype, [&]<class X>() {
        X* const to = static_cast<X*>(state.S.data) + (index * in.size + first) * keys;
        transpose_into<A>(S, padded<T>(values), keys, values, to, keys);
      });
    else
      ChunkCall<T>::store_state(S, index, in.size, first, values, state.S);
    if (first > 0) return;
    if (state.z) store_array(z, keys, state.z, index * keys);
    if (state.m) store_array(m, 1, state.m, index);
  }
};

}  // namespace
}  // namespace seqkern::linear_attention

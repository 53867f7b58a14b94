// Where the backward finds and leaves things: units of work, parts of gradients and their sums, states. Internal to
// cpu.cpp.
#pragma once
#include "common/chunk_bwd.h"
#include "delta_rule/cpu_call.h"

namespace seqkern::delta_rule {
namespace {

// Value heads [head, head + heads) of a key head, and values [value, value + values) of each.
struct Unit {
  const Run* run;
  int64_t key_head, part, head, heads, value_part, value, values;
};

// Of a chunk and key head, (tokens, K), as sums over value heads: gradients of q, k and e, with their factors of
// [norm].
template <class A>
struct KeyGradients {
  A *dq, *dk, *de;

  template <class Take>
  void allocate(int64_t row, const Take& take) {
    dq = take(kChunk * row), dk = take(kChunk * row), de = take(kChunk * row);
  }
};

template <class T>
struct BackwardCall : Call<T> {
  using A = SumOf<T>;
  using Call<T>::in, Call<T>::keys, Call<T>::key_row, Call<T>::per_key, Call<T>::erases, Call<T>::group;

  const BwdParams& p;
  const int64_t head_parts = parts_of_group(in), value_parts = bwd_value_parts(in), parts = head_parts * value_parts;
  const int64_t max_values = bwd_values_of_part(in), most_heads = most_heads_of_part(in);
  const int64_t max_row = padded<T>(max_values);
  const int64_t state_size = round_up(max_values, kWidestVector) * key_row;  // of S^T (values, K)
  const int64_t tokens = in.sequences.batch * in.sequences.length;
  const bool large = tokens * in.value_heads * in.size * size_of(in.v.dtype) >= kLargeBytes;
  const BwdWorkspace sizes = BwdWorkspace(in);
  A* const key_partials = static_cast<A*>(p.workspace);
  A* const number_partials = key_partials + sizes.keys;
  A* const decay_partials = number_partials + sizes.numbers;

  explicit BackwardCall(const BwdParams& params) : Call<T>(params), p(params) {}

  // ---- units, counted as (runs, H, parts of value heads, parts of values)

  int64_t num_units() const { return in.num_runs * in.heads * parts; }
  Unit unit(int64_t i) const {
    const int64_t part = i % parts, key_head = i / parts % in.heads;
    const int64_t head_part = part / value_parts, value_part = part % value_parts, value = value_part * max_values;
    const int64_t head = head_part * group / head_parts, heads = (head_part + 1) * group / head_parts - head;
    return {in.runs + i / parts / in.heads,      key_head, part, key_head * group + head, heads, value_part, value,
            at_most(max_values, in.size - value)};
  }
  static int64_t num_chunks(const Run& run) { return ceil_div(run.end - run.begin, kChunk); }
  static Chunk chunk(const Run& run, int64_t c) {
    return {&run, c * kChunk, at_most(kChunk, run.end - run.begin - c * kChunk)};
  }

  // ---- values of a unit

  void load_values(const TokenData& x, const Unit& u, const Chunk& here, int64_t head, const Next& next,
                   A* rows) const {
    this->load_rows(this->values_from(x, u.value), here, head, u.values, padded<T>(u.values), next, rows);
  }
  void store_values(const A* rows, const TokenData& x, const Unit& u, const Chunk& here, int64_t head) const {
    this->store_rows(rows, padded<T>(u.values), this->values_from(x, u.value), here, head, u.values, large);
  }

  void store_key_rows(const A* rows, const TokenData& x, const Chunk& here, int64_t head) const {
    this->store_rows(rows, key_row, x, here, head, keys, large);
  }

  // ---- gradients that are sums over parts

  // dq, dk or derase (which: 0, 1, 2) of a unit: the result, or one of its summands.
  TokenData keys_of_part(int64_t part, int which) const {
    if (parts == 1) return which == 0 ? p.dq : which == 1 ? p.dk : p.derase;
    return partial(key_partials, part * 3 + which, in.heads, keys);
  }
  // dbeta or ddecay (0, 1), a number per token and value head.
  TokenData numbers_of_part(int64_t value_part, int which) const {
    if (value_parts == 1) return which == 0 ? p.dbeta : p.ddecay;
    return partial(number_partials, value_part * 2 + which, in.value_heads, 1);
  }
  TokenData decays_of_part(int64_t value_part) const {
    return value_parts == 1 ? p.ddecay : partial(decay_partials, value_part, in.value_heads, keys);
  }
  // The index-th (B, L, heads, size).
  TokenData partial(A* from, int64_t index, int64_t heads, int64_t size) const {
    const int64_t of_token = heads * size;
    return {from + index * tokens * of_token, in.accumulator, in.sequences.length * of_token, of_token, size};
  }

  // What a unit has found for its key head.
  void store_keys(const Unit& u, const Chunk& here, const Keys<A>& of, const KeyGradients<A>& d) const {
    const int64_t count = here.count;
    if (!erases)
      for (int64_t i = 0; i < count * key_row; i += key_row) add_row(A{1}, d.de + i, key_row, d.dk + i);
    if (in.normalize && per_key) this->scale_rows(of.q_norm, count, d.dq), this->scale_rows(of.k_norm, count, d.dk);
    if (parts == 1) {
      if (in.normalize && !per_key) this->normalize(count, of);
      return finish_keys(here, u.key_head, of, d);
    }
    store_key_rows(d.dq, keys_of_part(u.part, 0), here, u.key_head);
    store_key_rows(d.dk, keys_of_part(u.part, 1), here, u.key_head);
    if (erases) store_key_rows(d.de, keys_of_part(u.part, 2), here, u.key_head);
  }
  // [dnorm] of whole sums and normalized rows.
  void finish_keys(const Chunk& here, int64_t key_head, const Keys<A>& of, const KeyGradients<A>& d) const {
    const auto project = [&](const A* x, A* dx) {
      for (int64_t i = 0; i < here.count * key_row; i += key_row)
        add_row(-dot(x + i, dx + i, key_row), x + i, key_row, dx + i);
    };
    if (in.normalize) project(of.q, d.dq), project(of.k, d.dk);
    store_key_rows(d.dq, p.dq, here, key_head);
    store_key_rows(d.dk, p.dk, here, key_head);
    if (erases) store_key_rows(d.de, p.derase, here, key_head);
  }

  // ---- sums over parts, in order; `i` counts the chunks of rows of the batch

  int64_t chunks_of_row() const { return ceil_div(in.sequences.length, kChunk); }
  void reduce(int64_t i, const Keys<A>& of, const KeyGradients<A>& d, A* numbers) const {
    const Run row = {i / chunks_of_row(), 0, in.sequences.length, -1, -1, false};
    const Chunk here = chunk(row, i % chunks_of_row());
    const int64_t count = here.count;
    A* const room = of.e_k;
    for (int64_t head = 0; head < in.heads; ++head) {
      const auto sum = [&](int which, A* to) {
        clear(to, count * key_row);
        for (int64_t part = 0; part < parts; ++part) add_keys(keys_of_part(part, which), here, head, of.q, to);
      };
      sum(0, d.dq), sum(1, d.dk);
      if (erases) sum(2, d.de);
      this->load_keys(here, head, of);
      if (in.normalize) this->normalize(count, of);
      finish_keys(here, head, of, d);
    }
    for (int64_t head = 0; value_parts > 1 && head < in.value_heads; ++head) {
      for (int which = 0; which < (in.form == Decay::kToken ? 2 : 1); ++which) {
        clear(numbers, kChunk);
        for (int64_t part = 0; part < value_parts; ++part) {
          this->load_numbers(numbers_of_part(part, which), here, head, room);
          add_row(A{1}, room, round_up(count, kLanes<A>), numbers);
        }
        this->store_numbers(numbers, which == 0 ? p.dbeta : p.ddecay, here, head);
      }
      if (!per_key) continue;
      clear(d.dq, count * key_row);
      for (int64_t part = 0; part < value_parts; ++part) add_keys(decays_of_part(part), here, head, of.q, d.dq);
      store_key_rows(d.dq, p.ddecay, here, head);
    }
  }
  void add_keys(const TokenData& x, const Chunk& here, int64_t head, A* room, A* sum) const {
    this->load_tokens(x, here, head, 0, keys, room);
    add_row(A{1}, room, here.count * key_row, sum);
  }

  // ---- states

  // Zeros where there is none.
  void load_state(const Array& states, int64_t row, const Unit& u, int64_t head, A* S) const {
    clear(S, state_size);
    if (!states || row < 0) return;
    visit_dtype(states.dtype, [&]<class X>() {
      const X* const from = static_cast<const X*>(states.data) + (row * in.value_heads + head) * keys * in.size;
      transpose_into<A>(from + u.value, in.size, keys, u.values, S, key_row);
    });
  }
  void store_state(const A* S, const Array& states, int64_t row, const Unit& u, int64_t head) const {
    visit_dtype(states.dtype, [&]<class X>() {
      X* const to = static_cast<X*>(states.data) + (row * in.value_heads + head) * keys * in.size;
      transpose_into<A>(S, key_row, u.values, keys, to + u.value, in.size);
    });
  }
};

}  // namespace
}  // namespace seqkern::delta_rule

// The forward pass. Internal to cpu.cpp.
#pragma once
#include "common/blocks.h"
#include "delta_rule/cpu_call.h"

namespace seqkern::delta_rule {
namespace {

template <class T>
struct Forward : Call<T> {
  using A = SumOf<T>;
  using Call<T>::in, Call<T>::keys, Call<T>::key_row, Call<T>::per_key, Call<T>::erases;

  const FwdParams& p;
  const Blocks<FwdParams> blocks = Blocks<FwdParams>(p);
  const int64_t max_row = padded<T>(blocks.max_values);

  explicit Forward(const FwdParams& params) : Call<T>(params), p(params) {}

  struct Arrays {
    Keys<A> keys;
    Scores<A> scores;
    TokenDecays<A> decays;
    KeyDecays<A> key_decays;
    typename Call<T>::Packed packed;
    A* beta;                                                 // (tokens)
    A *v, *u, *o;                                            // (tokens, V)
    A* S;                                                    // (heads, K, V) of a block
    T *of_q, *of_e, *of_k, *of_kt, *of_S, *of_u, *of_reads;  // operands

    template <class Take>
    void allocate(const Forward& call, const Take& take) {
      const int64_t K = call.keys, rows = kChunk * call.max_row, values = call.blocks.max_values;
      const auto operands = [&](int64_t count) { return Call<T>::take_operands(take, count); };
      keys.allocate(call.erases, call.per_key, call.key_row, take);
      scores.allocate(take), decays.allocate(take), beta = take(kChunk);
      if (call.per_key) key_decays.allocate(call.key_row, take), packed.allocate(K, take);
      v = take(rows), u = take(rows), o = take(rows);
      S = take(call.blocks.max_heads * round_up(K, kSubChunk) * call.max_row);
      of_q = operands(left_room<T>(kChunk, K)), of_e = operands(left_room<T>(kChunk, K));
      of_k = operands(left_room<T>(K, kChunk)), of_kt = operands(right_room<T>(K, kChunk));
      of_S = operands(right_room<T>(K, values)), of_u = operands(right_room<T>(kChunk, values));
      of_reads = operands(left_room<T>(kChunk, kChunk));
    }
    A* state(const Forward& call, int64_t head) const {
      return S + head * round_up(call.keys, kSubChunk) * call.max_row;
    }
  };
  struct Workspace : InScratch<A, Arrays> {
    const Multiplier<T> multiplier;
    const FlushSubnormals flush;  // which products of many decays become, and stay for long

    explicit Workspace(const Forward& call) : InScratch<A, Arrays>(call) { this->scores.clear_all(); }
  };

  void run() const {
    blocks.template for_all<Workspace>(*this, [&](const Block& block, const Arrays& a) { scan(block, a); });
  }

  void scan(const Block& block, const Arrays& a) const {
    const int64_t tokens = block.run->end - block.run->begin;
    for (int64_t h = 0; h < block.heads; ++h) load_initial(block, h, a);
    for (int64_t first = 0; first < tokens; first += kChunk) {
      const Chunk chunk{block.run, first, at_most(kChunk, tokens - first)};
      Operands operands;
      for (int64_t h = 0; h < block.heads; ++h) {
        const int64_t head = block.head + h;
        const Next next(block.heads, h, 1);
        if (per_key || h == 0 || head % this->group == 0) operands = load_operands(chunk, head / this->group, next, a);
        advance(block, chunk, h, next, operands, a);
      }
    }
    for (int64_t h = 0; h < block.heads; ++h) store_final(block, h, a);
  }
  void load_initial(const Block& block, int64_t h, const Arrays& a) const {
    A* const S = a.state(*this, h);
    clear(S, keys * padded<T>(block.values));
    const int64_t row = block.run->initial * in.value_heads + block.head + h;
    if (in.initial_state && block.run->initial >= 0)
      this->load_state(in.initial_state, row, in.size, block.value, block.values, S);
  }
  void store_final(const Block& block, int64_t h, const Arrays& a) const {
    const int64_t row = block.run->final * in.value_heads + block.head + h;
    if (p.final_state && block.run->final >= 0)
      this->store_state(a.state(*this, h), row, in.size, block.value, block.values, p.final_state);
  }

  // q, e (tokens, K) and k^T (K, tokens) of a chunk.
  struct Operands {
    Left<T> q, e, k;
  };
  Operands load_operands(const Chunk& chunk, int64_t key_head, const Next& next, const Arrays& a) const {
    this->load_keys(chunk, key_head, a.keys, next);
    if (per_key) return {};  // which decays of a value head are yet to enter
    const Operands operands = pack(chunk.count, a);
    this->multiply_keys(operands.q, operands.e, pack_right(a.keys.k, 1, key_row, keys, chunk.count, a.of_kt),
                        chunk.count, a.keys);
    return operands;
  }
  Operands pack(int64_t count, const Arrays& a) const {
    return {pack_left(a.keys.q, key_row, 1, count, keys, a.of_q), pack_left(a.keys.e, key_row, 1, count, keys, a.of_e),
            pack_left(a.keys.k, 1, key_row, keys, count, a.of_k)};
  }

  void advance(const Block& block, const Chunk& chunk, int64_t h, const Next& next, Operands operands,
               const Arrays& a) const {
    const int64_t count = chunk.count, head = block.head + h, row = padded<T>(block.values);
    A* const S = a.state(*this, h);
    this->load_rows(this->values_from(in.v, block.value), chunk, head, block.values, row, next, a.v);
    this->load_beta(chunk, head, a.beta);
    if (per_key) {
      this->load_decays(chunk, head, a.key_decays, next);
      this->normalize(count, a.keys);
      this->decay_scores(a.key_decays, count, a.keys.q, a.keys.e, a.keys.k, a.packed, a.beta, a.scores);
      operands = pack(count, a);
    } else {
      this->load_decays(chunk, head, a.decays);
      this->decay_scores(a.decays, count, a.keys, a.beta, a.scores);
    }
    const Right<T> of_S = pack_right(S, row, 1, keys, block.values, a.of_S, true);
    erase(operands.e, of_S, block, count, a);
    if (p.u) this->store_tokens(a.u, p.u, chunk, head, block.value, block.values);
    read(operands.q, of_S, block, count, a);
    this->store_tokens(a.o, p.o, chunk, head, block.value, block.values);
    write(operands.k, block, count, S, a);
  }

  // [solve] u
  void erase(Left<T> e, Right<T> S, const Block& block, int64_t count, const Arrays& a) const {
    const int64_t row = padded<T>(block.values);
    multiply(e, S, a.u, row, count, block.values, keys, false);
    if (!per_key) scale_tokens(a.decays.read, a.keys.e_norm, count, row, a.u);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = i * row; j < (i + 1) * row; j += kLanes<A>)
        store<A>(a.u + j, a.beta[i] * (load<A>(a.v + j) - load<A>(a.u + j)));
    solve<false>(a.scores.system, count, a.u, row);
  }

  // [chunk] o
  void read(Left<T> q, Right<T> S, const Block& block, int64_t count, const Arrays& a) const {
    const int64_t row = padded<T>(block.values);
    multiply(q, S, a.o, row, count, block.values, keys, false);
    if (!per_key) scale_tokens(a.decays.read, a.keys.q_norm, count, row, a.o);
    multiply(pack_left(a.scores.reads, kChunk, 1, count, count, a.of_reads),
             pack_right(a.u, row, 1, count, block.values, a.of_u, true), a.o, row, count, block.values, count, true,
             Band::kLower);
    scale_row(static_cast<A>(in.scale), a.o, count * row, a.o);
  }

  // [carry] S; u is lost.
  void write(Left<T> k, const Block& block, int64_t count, A* S, const Arrays& a) const {
    const int64_t row = padded<T>(block.values);
    if (per_key) {
      A* const total = a.key_decays.total;  // exp(c_C), the product of all sub-chunks
      for (int64_t i = kSubChunk; i < count; i += kSubChunk)
        multiply_row(total + i / kSubChunk * key_row, total, key_row, total);
      for (int64_t key = 0; key < keys; ++key) scale_row(total[key], S + key * row, row, S + key * row);
    } else {
      scale_tokens(a.decays.left, a.keys.k_norm, count, row, a.u);
      scale_row(*a.decays.total, S, keys * row, S);
    }
    multiply(k, pack_right(a.u, row, 1, count, block.values, a.of_u, true), S, row, keys, block.values, count, true);
  }

  // Rows of values by the decay and the norm of their tokens.
  static void scale_tokens(const A* decays, const A* norms, int64_t count, int64_t row, A* x) {
    for (int64_t i = 0; i < count; ++i) scale_row(decays[i] * norms[i], x + i * row, row, x + i * row);
  }
};

}  // namespace
}  // namespace seqkern::delta_rule

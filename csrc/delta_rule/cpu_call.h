// What forward and backward share beside common/chunk.h: the keys, the decays and the scores of a chunk. Internal to
// cpu.cpp.
//
// Rows of q, k and e stay as they lie in memory, so that 16-bit operands of products are exact; [norm] is a factor per
// token, which joins the decays. Where decays are per key, rows are scaled by them anyway, and normalized with them.
#pragma once
#include "delta_rule/cpu_plan.h"
#include "delta_rule/cpu_solve.h"

namespace seqkern::delta_rule {
namespace {

// Of a chunk and key head.
template <class A>
struct Keys {
  A *q, *k, *e;                 // (tokens, K); e is k itself where no erase key is given and decays are not per key
  A *q_norm, *k_norm, *e_norm;  // (tokens): [norm] 1 / sqrt(sum of squares + kNormEps), or 1
  A *q_k, *e_k;                 // (tokens, kChunk): q_i . k_j and e_i . k_j for j <= i, normalized

  template <class Take>
  void allocate(bool erases, bool per_key, int64_t row, const Take& take) {
    q = take(kChunk * row), k = take(kChunk * row), e = erases || per_key ? take(kChunk * row) : k;
    q_norm = take(kChunk), k_norm = take(kChunk), e_norm = erases ? take(kChunk) : k_norm;
    q_k = take(kChunk * kChunk), e_k = take(kChunk * kChunk);
  }
};

// Of a chunk and value head; (tokens, kChunk), zero above the diagonal.
template <class A>
struct Scores {
  A* reads;     // P: what token i reads of token j
  A* erasures;  // A: what it erases; zero on the diagonal, too
  A* system;    // -diag(beta) A

  template <class Take>
  void allocate(const Take& take) {
    reads = take(kChunk * kChunk), erasures = take(kChunk * kChunk), system = take(kChunk * kChunk);
  }
  // Once: the kernels write on and below the diagonal only.
  void clear_all() const {
    clear(reads, kChunk * kChunk), clear(erasures, kChunk * kChunk), clear(system, kChunk * kChunk);
  }
};

// T: operands of matrix products.
template <class T>
struct Call : ChunkCall<T> {
  using A = SumOf<T>;
  using ChunkCall<T>::keys, ChunkCall<T>::key_row;

  const Inputs& in;
  const bool per_key = in.form == Decay::kKey;
  const bool erases = static_cast<bool>(in.erase);  // with keys of their own
  // [scores] are products of exact operands, or of full ones: the triangular system is not rounded.
  const ChunkCall<A> full = ChunkCall<A>(in.sequences, in.heads, in.value_heads, in.keys);
  using Packed = typename ChunkCall<A>::Packed;

  explicit Call(const Inputs& inputs)
      : ChunkCall<T>(inputs.sequences, inputs.heads, inputs.value_heads, inputs.keys), in(inputs) {}

  // Of values: those from one on.
  static TokenData values_from(const TokenData& x, int64_t value) {
    return {static_cast<char*>(x.data) + value * size_of(x.dtype), x.dtype, x.b, x.l, x.h};
  }

  // ---- [norm]

  void load_keys(const Chunk& chunk, int64_t key_head, const Keys<A>& to, const Next& next = Next(1)) const {
    this->load_rows(in.q, chunk, key_head, keys, key_row, next, to.q);
    this->load_rows(in.k, chunk, key_head, keys, key_row, next, to.k);
    if (erases) {
      this->load_rows(in.erase, chunk, key_head, keys, key_row, next, to.e);
      fill(to.e_norm, kChunk, A{1});
    }
    load_norms(to.q, chunk.count, to.q_norm);
    load_norms(to.k, chunk.count, to.k_norm);
  }
  void load_norms(const A* x, int64_t count, A* norms) const {
    if (!in.normalize) return fill(norms, kChunk, A{1});
    sums_of_rows<A>(count, norms, [&](int64_t i) { return dot_lanes(x + i * key_row, x + i * key_row, key_row); });
    for (int64_t i = 0; i < count; i += kLanes<A>)
      store<A>(norms + i, 1 / sqrt(load<A>(norms + i) + static_cast<A>(kNormEps)));
  }
  // Rows of q, k and e themselves, as decays per key want them.
  void normalize(int64_t count, const Keys<A>& of) const {
    if (in.normalize) scale_rows(of.q_norm, count, of.q), scale_rows(of.k_norm, count, of.k);
    if (!erases) copy(of.k, count * key_row, of.e);
  }
  void scale_rows(const A* factors, int64_t count, A* x) const {
    for (int64_t i = 0; i < count; ++i) scale_row(factors[i], x + i * key_row, key_row, x + i * key_row);
  }

  // q_k and e_k. `left_q`, `left_e`: q and e as packed operands; `kt`: k^T.
  void multiply_keys(Left<T> left_q, Left<T> left_e, Right<T> kt, int64_t count, const Keys<A>& of) const {
    this->multiply_lower(left_q, kt, of.q_k, count, keys);
    this->multiply_lower(left_e, kt, of.e_k, count, keys);
    if (!in.normalize) return;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j <= i; j += kLanes<A>) {
        const Vec<A> k_norm = load<A>(of.k_norm + j);
        A *const q_k = of.q_k + i * kChunk + j, *const e_k = of.e_k + i * kChunk + j;
        store<A>(q_k, of.q_norm[i] * k_norm * load<A>(q_k));
        store<A>(e_k, of.e_norm[i] * k_norm * load<A>(e_k));
      }
  }

  // ---- decays and scores of a chunk and value head

  void load_beta(const Chunk& chunk, int64_t head, A* beta) const { this->load_numbers(in.beta, chunk, head, beta); }

  void load_decays(const Chunk& chunk, int64_t head, const TokenDecays<A>& decays) const {
    clear(decays.g, kChunk);
    if (in.form == Decay::kToken) this->load_numbers(in.decay, chunk, head, decays.g);
    decays.accumulate(chunk.count, false);
  }
  void load_decays(const Chunk& chunk, int64_t head, const KeyDecays<A>& decays, const Next& next = Next(1)) const {
    this->load_rows(in.decay, chunk, head, keys, key_row, next, decays.step);
    decays.accumulate(chunk.count, key_row, false);
  }

  // [scores] with decays per token.
  void decay_scores(const TokenDecays<A>& decays, int64_t count, const Keys<A>& of, const A* beta,
                    const Scores<A>& to) const {
    for_each_decay(decays.g, count, false, [&](int64_t i, int64_t j, Vec<A> exps, auto mask) {
      const int64_t ij = i * kChunk + j;
      store<A>(to.reads + ij, select(mask, exps * load<A>(of.q_k + ij), Vec<A>{}));
      store<A>(to.erasures + ij, select(mask, exps * load<A>(of.e_k + ij), Vec<A>{}));
    });
    finish_scores(count, beta, to);
  }
  // [scores] with decays per key, of normalized rows. On return q and e hold exp(c_i) * q_i and exp(c_i) * e_i, and k
  // holds exp(c_C - c_j) * k_j.
  void decay_scores(const KeyDecays<A>& decays, int64_t count, A* q, A* e, A* k, const Packed& packed, const A* beta,
                    const Scores<A>& to) const {
    full.scores_per_key(decays, count, false, {{q, to.reads}, {e, to.erasures}}, k, packed);
    finish_scores(count, beta, to);
  }
  void finish_scores(int64_t count, const A* beta, const Scores<A>& to) const {
    for (int64_t i = 0; i < count; ++i) {
      A* const erasures = to.erasures + i * kChunk;
      erasures[i] = 0;
      scale_row(-beta[i], erasures, i + 1, to.system + i * kChunk);
    }
  }
};

}  // namespace
}  // namespace seqkern::delta_rule

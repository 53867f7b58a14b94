// The backward of scores: what the tokens of a chunk do to each other's decays, and to q and k with decays per key.
// Internal to cpu.cpp.
#pragma once
#include "linear_attention/cpu_bwd_call.h"

namespace seqkern::linear_attention {
namespace {

// Sums of a chunk and value head, a number per token.
template <class A>
struct TokenSums {
  A* across;       // sum of P_ij dP_ij over the pairs i, j between which t decays
  A* columns;      // sum over i of P_ij dP_ij, without w_j
  A *of_q, *of_k;  // q_i . dq_i and k_j . dk_j through the state; dk_j without w_j
  A* diagonal;     // q_i . (bonus * k_i)
  A* lanes;        // (tokens, kLanes)

  template <class Take>
  void allocate(const Take& take) {
    across = take(kChunk), columns = take(kChunk), of_q = take(kChunk), of_k = take(kChunk), diagonal = take(kChunk);
    lanes = take(kChunk * kLanes<A>);
  }

  // [ddecay] across and columns of x (tokens, kChunk), P_ij dP_ij without w_j: rows are added from the last to the
  // first, nothing is subtracted.
  void add_scores(const A* x, const A* w, int64_t count, bool read_previous) const {
    Vec<A> lane{};
    for (int i = 0; i < kLanes<A>; ++i) lane[i] = static_cast<A>(i);
    clear(columns, kChunk);
    const auto add = [&](int64_t i) {
      for (int64_t j = 0; j <= i; j += kLanes<A>)
        store<A>(columns + j, load<A>(columns + j) + load<A>(x + i * kChunk + j));
    };
    for (int64_t t = count - 1; t >= 0; --t) {
      if (!read_previous) add(t);
      Vec<A> sum{};
      for (int64_t j = 0; j < t; j += kLanes<A>) {
        const Vec<A> weighted = load<A>(w + j) * load<A>(columns + j);
        sum += select(lane < splat(static_cast<A>(t - j)), weighted, Vec<A>{});
      }
      store<A>(lanes + t * kLanes<A>, sum);
      if (read_previous) add(t);
    }
    sums_of_rows<A>(count, across, [&](int64_t t) { return load<A>(lanes + t * kLanes<A>); });
  }
};

// Decays per key of a chunk and value head.
template <class A>
struct KeyScores {
  KeyGates<A> gates;
  A *before, *after;  // (sub-chunks, K): exp of g from the chunk's start to a sub-chunk's, and from its end on
  A* total;           // (K): exp(c_C)
  A* both;            // (K): exp(c_C) * sum over values of dS and S, before the chunk
  A *q, *k;           // (tokens, K), decayed to an anchor
  A *dq, *dk;         // (tokens, K): among the tokens of the chunk
  A* dg;              // (tokens, K)

  template <class Take>
  void allocate(bool per_key, int64_t row, const Take& take) {
    if (!per_key) return;
    gates.allocate(row, take);
    before = take(kChunk / kSubChunk * row), after = take(kChunk / kSubChunk * row);
    total = take(row), both = take(row);
    const int64_t rows = kChunk * row;
    q = take(rows), k = take(rows), dq = take(rows), dk = take(rows), dg = take(rows);
  }

  // `gates.step` holds g.
  void accumulate(int64_t count, int64_t row, bool read_previous) const {
    const int64_t sub_chunks = ceil_div(count, kSubChunk);
    gates.accumulate(count, row, read_previous);
    for (int64_t k = 0; k < row; k += kLanes<A>) {
      Vec<A> product = Vec<A>{} + 1;
      for (int64_t s = 0; s < sub_chunks; ++s) {
        store<A>(before + s * row + k, product);
        product = product * load<A>(gates.total + s * row + k);
      }
      store<A>(total + k, product);
      product = Vec<A>{} + 1;
      for (int64_t s = sub_chunks - 1; s >= 0; --s) {
        store<A>(after + s * row + k, product);
        product = product * load<A>(gates.total + s * row + k);
      }
    }
  }

  // exp(r_i) * q_i in the place of q_i.
  void read(int64_t count, int64_t row, A* of_q) const {
    multiply_row(gates.read, of_q, count * row, of_q);
    for (int64_t i = 0; i < count; ++i) multiply_row(before + i / kSubChunk * row, of_q + i * row, row, of_q + i * row);
  }

  // dS *= exp(c_C); and `both`.
  void decay_dS(const A* S, A* dS, int64_t width, int64_t row) const {
    for (int64_t k = 0; k < row; k += kLanes<A>) {
      const Vec<A> decay = load<A>(total + k);
      Vec<A> sum{};
      for (int64_t i = k; i < width * row; i += row) {
        const Vec<A> decayed = decay * load<A>(dS + i);
        sum = madd(load<A>(S + i), decayed, sum);
        store<A>(dS + i, decayed);
      }
      store<A>(both + k, sum);
    }
  }
};

// dq and dk of the pairs i > j of one sub-chunk, added. dscores (tokens, kChunk), the others (tokens, row).
template <class A>
inline void differentiate_sub_chunk(const A* q, const A* k, const A* decays, int64_t row, const A* dscores,
                                    int64_t count, bool read_previous, A* dq, A* dk) {
  for (int64_t at = 0; at < row; at += kLanes<A>) {
    Vec<A> of_dq[kSubChunk] = {};
    for (int64_t j = 0; j + 1 < count; ++j) {
      const Vec<A> of_k = load<A>(k + j * row + at);
      Vec<A> decay = Vec<A>{} + 1, of_dk{};
      for (int64_t i = j + 1; i < count; ++i) {
        const Vec<A> next = decay * load<A>(decays + i * row + at);
        const Vec<A> factor = splat(dscores[i * kChunk + j]) * (read_previous ? decay : next);
        of_dq[i] = madd(factor, of_k, of_dq[i]);
        of_dk = madd(factor, load<A>(q + i * row + at), of_dk);
        decay = next;
      }
      store<A>(dk + j * row + at, load<A>(dk + j * row + at) + of_dk);
    }
    for (int64_t i = 1; i < count; ++i) store<A>(dq + i * row + at, load<A>(dq + i * row + at) + of_dq[i]);
  }
}

// With decays per key: dq and dk, added, and dg of q, k (tokens, row), what they read of S and dS (not yet decayed),
// and dP.
template <class T, class A>
inline void differentiate_keys(const Call<T>& call, const A* q, const A* k, const A* S_dn, const A* dS_v,
                               const A* dscores, int64_t count, const KeyScores<A>& of, T* left, T* right, A* dq,
                               A* dk) {
  const KeyGates<A>& gates = of.gates;
  const int64_t keys = call.in.keys, row = call.key_row;
  const bool read_previous = call.in.read_previous;
  copy(k, count * row, of.k);
  // [dq] from earlier sub-chunks, whose keys move on from anchor to anchor
  for (int64_t start = 0; start < count; start += kSubChunk) {
    const int64_t tokens = at_most(kSubChunk, count - start);
    A* const of_dq = of.dq + start * row;
    if (start > 0) {
      const Left<T> dP = pack_left(dscores + start * kChunk, kChunk, 1, tokens, start, left);
      multiply(dP, pack_right(of.k, row, 1, start, keys, right, true), of_dq, row, tokens, keys, start, false);
      multiply_row(gates.read + start * row, of_dq, tokens * row, of_dq);
    } else {
      clear(of_dq, tokens * row);
    }
    call.move_keys(gates, start, tokens, of.k);
  }
  // [dk] from later sub-chunks, moving back from anchor to anchor
  clear(of.dk, count * row);
  for (int64_t start = (count - 1) / kSubChunk * kSubChunk; start > 0; start -= kSubChunk) {
    const int64_t tokens = at_most(kSubChunk, count - start);
    for (int64_t j = 0; j < start; ++j)
      multiply_row(gates.total + start / kSubChunk * row, of.dk + j * row, row, of.dk + j * row);
    multiply_row(gates.read + start * row, q + start * row, tokens * row, of.q);
    const Left<T> dPt = pack_left(dscores + start * kChunk, 1, kChunk, start, tokens, left);
    multiply(dPt, pack_right(of.q, row, 1, tokens, keys, right, true), of.dk, row, start, keys, tokens, true);
  }
  multiply_row(gates.left, of.dk, count * row, of.dk);
  for (int64_t start = 0; start < count; start += kSubChunk)
    differentiate_sub_chunk(q + start * row, k + start * row, gates.step + start * row, row,
                            dscores + start * kChunk + start, at_most(kSubChunk, count - start), read_previous,
                            of.dq + start * row, of.dk + start * row);
  // [ddecay]: the diagonal i = j decays nowhere
  for (int64_t at = 0; at < row; at += kLanes<A>) {
    Vec<A> later = load<A>(of.both + at), earlier{};
    for (int64_t t = count - 1; t >= 0; --t) {
      const int64_t i = t * row + at, sub_chunk = t / kSubChunk * row + at;
      const Vec<A> of_q = load<A>(q + i), of_k = load<A>(k + i), dP = splat(dscores[t * kChunk + t]);
      const Vec<A> dq_in = load<A>(of.dq + i), dk_in = load<A>(of.dk + i);
      const Vec<A> dq_state = load<A>(gates.read + i) * load<A>(of.before + sub_chunk) * load<A>(S_dn + i);
      const Vec<A> dk_state = load<A>(gates.left + i) * load<A>(of.after + sub_chunk) * load<A>(dS_v + i);
      const Vec<A> from_q = of_q * (dq_in + dq_state), before = later;
      later += from_q - of_k * dk_in;
      store<A>(of.dg + i, read_previous ? before - of_k * dk_in : later);
      store<A>(of.k + i, of_k * dk_state);
      const Vec<A> diagonal = read_previous ? Vec<A>{} : dP;
      store<A>(dq + i, load<A>(dq + i) + madd(diagonal, of_k, dq_in + dq_state));
      store<A>(dk + i, load<A>(dk + i) + madd(diagonal, of_q, dk_in + dk_state));
    }
    for (int64_t t = 0; t < count; ++t) {
      const int64_t i = t * row + at;
      const auto none_left = load<A>(gates.step + i) == 0;
      store<A>(of.dg + i, select(none_left, Vec<A>{}, load<A>(of.dg + i) + earlier));
      earlier += load<A>(of.k + i);
    }
  }
}

}  // namespace
}  // namespace seqkern::linear_attention

// What backward CPU kernels that take time in chunks share beside common/chunk.h: the walk through states, and what the
// tokens of a chunk do to each other's decays and, with decays per key, to q and k.
//
// P_ij are the scores of a chunk: what reader i, such as q_i, has in common with key j, decayed. dS is the gradient of
// the state after a chunk, then of that before it. States are S^T (values, K).
#pragma once
#include "common/chunk.h"

namespace seqkern {
namespace {

// ---- the walk

// A walk through the chunks of a run forward, for the states before them, each of `size` numbers, and then backward.
// states (stretch + 1, size), the first of which is given; starts (stretches, size). States before the chunks of one
// stretch are kept; of a longer run those before each stretch are, and the stretch is walked through once more.
//
// Calls advance(c, S, S_after) for chunks c, turn(S) with the last state, and back(c, S).
template <class A, class Advance, class Turn, class Back>
inline void walk_back(int64_t chunks, int64_t stretch, int64_t size, A* states, A* starts, const Advance& advance,
                      const Turn& turn, const Back& back) {
  const int64_t last = at_least(0, chunks - 1) / stretch * stretch;
  for (int64_t c = 0; c < chunks; ++c) {
    A* const S = states + c % stretch * size;
    if (c % stretch == 0) {
      if (c > 0) copy(states + stretch * size, size, states);
      copy(states, size, starts + c / stretch * size);
    }
    advance(c, S, S + size);
  }
  turn(states + (chunks - last) * size);
  for (int64_t first = last; first >= 0 && chunks > 0; first -= stretch) {
    if (first < last) {
      copy(starts + first / stretch * size, size, states);
      for (int64_t c = 0; c + 1 < stretch; ++c) advance(first + c, states + c * size, states + (c + 1) * size);
    }
    for (int64_t c = at_most(stretch, chunks - first) - 1; c >= 0; --c) back(first + c, states + c * size);
  }
}

// ---- decays of a chunk and value head, a number per token

// [ddecay] is a sum of what crosses a token. Keys may have weights w, 1 if absent.
template <class A>
struct TokenSums {
  A* across;       // sum of P_ij dP_ij over the pairs i, j between which t decays
  A* columns;      // sum over i of P_ij dP_ij, without w_j
  A *of_q, *of_k;  // q_i . dq_i and k_j . dk_j through the state; dk_j without w_j
  A* lanes;        // (tokens, kLanes)

  template <class Take>
  void allocate(const Take& take) {
    across = take(kChunk), columns = take(kChunk), of_q = take(kChunk), of_k = take(kChunk);
    lanes = take(kChunk * kLanes<A>);
  }

  // across and columns of x (tokens, kChunk), P_ij dP_ij without w_j: rows are added from the last to the first,
  // nothing is subtracted.
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
        const Vec<A> column = load<A>(columns + j), weighted = w ? load<A>(w + j) * column : column;
        sum += select(lane < splat(static_cast<A>(t - j)), weighted, Vec<A>{});
      }
      store<A>(lanes + t * kLanes<A>, sum);
      if (read_previous) add(t);
    }
    sums_of_rows<A>(count, across, [&](int64_t t) { return load<A>(lanes + t * kLanes<A>); });
  }

  // dg of all sums. `both`: exp(c_C) <dS, S>, what dS and S before the chunk have in common after it.
  void differentiate(A both, const A* w, int64_t count, bool read_previous, A* dg) const {
    A later = both, earlier = 0;
    for (int64_t t = count - 1; t >= 0; --t) {
      const A before = later;
      later += of_q[t];
      dg[t] = across[t] + (read_previous ? before : later);
    }
    for (int64_t t = 0; t < count; ++t) {
      dg[t] += earlier;
      earlier += w ? w[t] * of_k[t] : of_k[t];
    }
  }
};

// ---- decays of a chunk and value head, a number per token and key

// Of a reader x, such as q: exp(r_i) * x_i reads the state, and P_ij is what it has in common with key j.
template <class A>
struct Read {
  const A* x;         // (tokens, K)
  const A* of_state;  // (tokens, K): the gradient of exp(r_i) * x_i, which comes from the state
  const A* dscores;   // (tokens, kChunk): dP
  bool diagonal;      // whether it has P_ii, which decays nowhere
  A* dx;              // (tokens, K), added to
};

template <class A>
struct KeyScores {
  KeyDecays<A> decays;
  A *before, *after;  // (sub-chunks, K): exp of g from the chunk's start to a sub-chunk's, and from its end on
  A* total;           // (K): exp(c_C)
  A* both;            // (K): exp(c_C) * sum over values of dS and S, before the chunk
  A *x, *k;           // (tokens, K), decayed to an anchor
  A *dx, *dk;         // (readers, tokens, K), (tokens, K): among the tokens of the chunk
  A* dg;              // (tokens, K)

  template <class Take>
  void allocate(int64_t readers, int64_t row, const Take& take) {
    decays.allocate(row, take);
    before = take(kChunk / kSubChunk * row), after = take(kChunk / kSubChunk * row);
    total = take(row), both = take(row);
    const int64_t rows = kChunk * row;
    x = take(rows), k = take(rows), dx = take(readers * rows), dk = take(rows), dg = take(rows);
  }

  // `decays.step` holds g.
  void accumulate(int64_t count, int64_t row, bool read_previous) const {
    const int64_t sub_chunks = ceil_div(count, kSubChunk);
    decays.accumulate(count, row, read_previous);
    for (int64_t k = 0; k < row; k += kLanes<A>) {
      Vec<A> product = Vec<A>{} + 1;
      for (int64_t s = 0; s < sub_chunks; ++s) {
        store<A>(before + s * row + k, product);
        product = product * load<A>(decays.total + s * row + k);
      }
      store<A>(total + k, product);
      product = Vec<A>{} + 1;
      for (int64_t s = sub_chunks - 1; s >= 0; --s) {
        store<A>(after + s * row + k, product);
        product = product * load<A>(decays.total + s * row + k);
      }
    }
  }

  // exp(r_i) * x_i in the place of x_i.
  void read(int64_t count, int64_t row, A* of_x) const {
    multiply_row(decays.read, of_x, count * row, of_x);
    for (int64_t i = 0; i < count; ++i) multiply_row(before + i / kSubChunk * row, of_x + i * row, row, of_x + i * row);
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

// dx and dk of the pairs i > j of one sub-chunk, added. dscores (tokens, kChunk), the others (tokens, row).
template <class A>
inline void differentiate_sub_chunk(const A* x, const A* k, const A* step, int64_t row, const A* dscores, int64_t count,
                                    bool read_previous, A* dx, A* dk) {
  for (int64_t at = 0; at < row; at += kLanes<A>) {
    Vec<A> of_dx[kSubChunk] = {};
    for (int64_t j = 0; j + 1 < count; ++j) {
      const Vec<A> of_k = load<A>(k + j * row + at);
      Vec<A> decay = Vec<A>{} + 1, of_dk{};
      for (int64_t i = j + 1; i < count; ++i) {
        const Vec<A> next = decay * load<A>(step + i * row + at);
        const Vec<A> factor = splat(dscores[i * kChunk + j]) * (read_previous ? decay : next);
        of_dx[i] = madd(factor, of_k, of_dx[i]);
        of_dk = madd(factor, load<A>(x + i * row + at), of_dk);
        decay = next;
      }
      store<A>(dk + j * row + at, load<A>(dk + j * row + at) + of_dk);
    }
    for (int64_t i = 1; i < count; ++i) store<A>(dx + i * row + at, load<A>(dx + i * row + at) + of_dx[i]);
  }
}

// With decays per key: dx and dk, added, and dg, of what readers and k (tokens, K) have of each other and of states:
// dS_v is the gradient of exp(c_C - c_j) * k_j, which comes from dS.
template <class T, int kReads, class A>
inline void differentiate_keys(const ChunkCall<T>& call, const Read<A> (&reads)[kReads], const A* k, const A* dS_v,
                               int64_t count, bool read_previous, const KeyScores<A>& of, T* left, T* right, A* dk) {
  const KeyDecays<A>& decays = of.decays;
  const int64_t keys = call.keys, row = call.key_row;
  const auto dx_of = [&](int r) { return of.dx + r * kChunk * row; };
  copy(k, count * row, of.k);
  // dx from earlier sub-chunks, whose keys move on from anchor to anchor
  for (int64_t start = 0; start < count; start += kSubChunk) {
    const int64_t tokens = at_most(kSubChunk, count - start);
    Right<T> earlier = {};
    if (start > 0) earlier = pack_right(of.k, row, 1, start, keys, right, true);
    for (int r = 0; r < kReads; ++r) {
      A* const dx = dx_of(r) + start * row;
      if (start == 0) {
        clear(dx, tokens * row);
        continue;
      }
      const Left<T> dP = pack_left(reads[r].dscores + start * kChunk, kChunk, 1, tokens, start, left);
      multiply(dP, earlier, dx, row, tokens, keys, start, false);
      multiply_row(decays.read + start * row, dx, tokens * row, dx);
    }
    call.move_keys(decays, start, tokens, of.k);
  }
  // dk from later sub-chunks, moving back from anchor to anchor
  clear(of.dk, count * row);
  for (int64_t start = (count - 1) / kSubChunk * kSubChunk; start > 0; start -= kSubChunk) {
    const int64_t tokens = at_most(kSubChunk, count - start);
    for (int64_t j = 0; j < start; ++j)
      multiply_row(decays.total + start / kSubChunk * row, of.dk + j * row, row, of.dk + j * row);
    for (const Read<A>& read : reads) {
      multiply_row(decays.read + start * row, read.x + start * row, tokens * row, of.x);
      const Left<T> dPt = pack_left(read.dscores + start * kChunk, 1, kChunk, start, tokens, left);
      multiply(dPt, pack_right(of.x, row, 1, tokens, keys, right, true), of.dk, row, start, keys, tokens, true);
    }
  }
  multiply_row(decays.left, of.dk, count * row, of.dk);
  for (int64_t start = 0; start < count; start += kSubChunk)
    for (int r = 0; r < kReads; ++r)
      differentiate_sub_chunk(reads[r].x + start * row, k + start * row, decays.step + start * row, row,
                              reads[r].dscores + start * kChunk + start, at_most(kSubChunk, count - start),
                              read_previous, dx_of(r) + start * row, of.dk + start * row);
  // [ddecay]: the diagonal i = j decays nowhere
  for (int64_t at = 0; at < row; at += kLanes<A>) {
    Vec<A> later = load<A>(of.both + at), earlier{};
    for (int64_t t = count - 1; t >= 0; --t) {
      const int64_t i = t * row + at, sub_chunk = t / kSubChunk * row + at;
      const Vec<A> read = load<A>(decays.read + i) * load<A>(of.before + sub_chunk), of_k = load<A>(k + i);
      const Vec<A> dk_in = load<A>(of.dk + i);
      const Vec<A> dk_state = load<A>(decays.left + i) * load<A>(of.after + sub_chunk) * load<A>(dS_v + i);
      Vec<A> from_reads{}, dk_sum = dk_in + dk_state;
      for (int r = 0; r < kReads; ++r) {
        const Vec<A> x = load<A>(reads[r].x + i),
                     diagonal = splat(reads[r].diagonal ? reads[r].dscores[t * kChunk + t] : A{0});
        const Vec<A> dx = load<A>(dx_of(r) + i) + read * load<A>(reads[r].of_state + i);
        from_reads = madd(x, dx, from_reads);
        dk_sum = madd(diagonal, x, dk_sum);
        store<A>(reads[r].dx + i, load<A>(reads[r].dx + i) + madd(diagonal, of_k, dx));
      }
      const Vec<A> before = later;
      later += from_reads - of_k * dk_in;
      store<A>(of.dg + i, read_previous ? before - of_k * dk_in : later);
      store<A>(of.k + i, of_k * dk_state);
      store<A>(dk + i, load<A>(dk + i) + dk_sum);
    }
    for (int64_t t = 0; t < count; ++t) {
      const int64_t i = t * row + at;
      const auto none_left = load<A>(decays.step + i) == 0;
      store<A>(of.dg + i, select(none_left, Vec<A>{}, load<A>(of.dg + i) + earlier));
      earlier += load<A>(of.k + i);
    }
  }
}

}  // namespace
}  // namespace seqkern

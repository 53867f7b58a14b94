// The forward by shooting: the unknowns are the states between chunks of a row. Internal to cpu.cpp.
#pragma once
#include "elementwise_rnn/cpu_solve.h"

namespace seqkern::elementwise_rnn {
namespace {

// In each sweep, side by side, chunks p go from s_p to F_p:
//   [sweep]    s_t, M_t = d s_t / d s_p, and N_p = max |M_t|;  F_p and M_p: of the last token
//              R_t = max(|J_t| R_{t-1}, rounding of s_t), what has grown of any rounding, and Q_p = max R_t;  R_p
//              likewise
//   [correct]  s_{p+1} += F_p - s_{p+1} + M_p (change of s_p)
//   [estimate] e_{p+1} = |M_p| e_p + R_p + |F_p - s_{p+1}|, within chunk p N_p e_p + Q_p: of the states before the
//              correction; without R_p and Q_p where e_p = 0, since equal states are rounded alike
// After k sweeps the first k chunks are exact, and are not swept again.
template <class C, class A>
struct Shooting : Iterative<C, A> {
  using Base = Iterative<C, A>;
  using Base::in, Base::width, Base::L, Base::kG, Base::kW, Base::kS, Base::p;
  using typename Base::V;

  const int64_t B = in.sequences.batch, tokens = chunk_tokens(in), chunks = num_chunks(in);
  const int64_t blocks = this->num_blocks(), pitch = padded_channels(in);
  A* const numbers = static_cast<A*>(p.workspace);                      // (B, chunks, numbers_of_chunk, pitch)
  A* const rows = numbers + B * chunks * numbers_of_chunk(in) * pitch;  // (B, 2, pitch)

  // Of a chunk, from a block's first channel on.
  struct Chunk {
    A *s, *F;  // (kS, pitch)
    A *M, *N;  // (kS, kS, pitch)
    A *R, *Q;  // (kS, pitch)
  };
  Chunk chunk(int64_t b, int64_t i, const Block& block) const {
    A* const s = numbers + (b * chunks + i) * numbers_of_chunk(in) * pitch + block.first;
    A* const R = s + (2 + 2 * kS) * kS * pitch;
    return {s, s + kS * pitch, s + 2 * kS * pitch, s + (2 + kS) * kS * pitch, R, R + kS * pitch};
  }
  // The sweep that a channel was accepted in, or 0; and its last estimate.
  A* accepted(int64_t b, const Block& block) const { return rows + 2 * b * pitch + block.first; }
  A* estimate(int64_t b, const Block& block) const { return accepted(b, block) + pitch; }

  explicit Shooting(const FwdParams& params) : Base(params, width_of_block(params), kSweeps) {}

  struct Arrays : Forward<C, A>::Arrays {
    A *M, *N;   // (kS, kS, width)
    A *R, *Q;   // (kS, width)
    A* marked;  // (width)

    template <class Take>
    void allocate(const Shooting& call, const Take& take) {
      Forward<C, A>::Arrays::allocate(call, take);
      M = take(kS * kS * call.width), N = take(kS * kS * call.width);
      R = take(kS * call.width), Q = take(kS * call.width), marked = take(call.width);
    }
  };
  using Workspace = InScratch<A, Arrays>;

  void run() const {
    if (in.channels == 0) return;
    for_all_blocks(1, [&](int64_t b, const Block& block, int64_t, const Arrays&) { begin(b, block); });
    const int64_t most = at_most(this->max_sweeps, chunks);
    int64_t sweeps = 0;
    for (bool open = true; open && sweeps < most; ++sweeps) {
      for_all_blocks(chunks - sweeps, [&](int64_t b, const Block& block, int64_t i, const Arrays& a) {
        if (is_open(b, block)) sweep(b, block, sweeps + i, a);
      });
      for_all_blocks(1, [&](int64_t b, const Block& block, int64_t, const Arrays&) {
        if (is_open(b, block)) judge_and_correct(b, block, sweeps + 1);
      });
      open = false;
      for (int64_t i = 0; i < B * blocks && !open; ++i) open = is_open(i / blocks, this->block(i % blocks));
    }
    for_all_blocks(1, [&](int64_t b, const Block& block, int64_t, const Arrays& a) { finish(b, block, sweeps, a); });
  }

  // Calls body(b, block, i, arrays) for (B, blocks) times i < count.
  template <class Body>
  void for_all_blocks(int64_t count, const Body& body) const {
    const int64_t grain = count == 1 ? kGrain / (width * chunks) : kGrain / (width * tokens);
    parallel_for(0, B * blocks * count, grain + 1, [&](int64_t begin, int64_t end) {
      const Workspace workspace(*this);
      for (int64_t i = begin; i < end; ++i)
        body(i / count / blocks, this->block(i / count % blocks), i % count, workspace);
    });
  }

  bool is_open(int64_t b, const Block& block) const {
    const A* const sweep = accepted(b, block);
    for (int64_t d = 0; d < block.count; ++d)
      if (sweep[d] == 0) return true;
    return false;
  }

  void begin(int64_t b, const Block& block) const {
    V guess[kS];
    C::guess(guess);
    for (int64_t d = 0; d < block.count; d += kLanes<A>) {
      store<A>(accepted(b, block) + d, V{});
      for (int64_t i = 0; i < chunks; ++i) store_vectors<A>(guess, chunk(b, i, block).s + d, pitch);
    }
  }

  void sweep(int64_t b, const Block& block, int64_t i, const Arrays& a) const {
    const Chunk of = chunk(b, i, block);
    this->load_weights(block, a.w);
    for (int64_t d = 0; d < block.count; d += kLanes<A>) {
      V s[kS], M[kS][kS] = {};
      load_vectors<A>(of.s + d, pitch, s);
      store_vectors<A>(s, a.s + d, width);
      store_vectors<A>(M, a.N + d, width);
      for (int j = 0; j < kS; ++j) M[j][j] = V{} + 1;
      store_vectors<A>(M, a.M + d, width);
    }
    clear(a.R, kS * width), clear(a.Q, kS * width);
    bool follows = true;  // from s_p
    const int64_t q = i * tokens;
    this->for_each_run(b, q, at_most(L, q + tokens), [&](const Run& run, int64_t from, int64_t to) {
      if (from == this->first(run)) {
        this->load_initial_state(run, block, a.s);
        clear(a.M, kS * kS * width), clear(a.R, kS * width);
        follows = false;
      }
      if (follows)
        advance_with_tangent(b, from, to, block, a);
      else
        this->advance(b, from, to, block, a);
      this->store_final_state(run, to, a.s, block);
    });
    for (int64_t d = 0; d < block.count; d += kLanes<A>) {
      V s[kS], matrix[kS][kS];
      load_vectors<A>(a.s + d, width, s), store_vectors<A>(s, of.F + d, pitch);
      load_vectors<A>(a.M + d, width, matrix), store_vectors<A>(matrix, of.M + d, pitch);
      load_vectors<A>(a.N + d, width, matrix), store_vectors<A>(matrix, of.N + d, pitch);
      load_vectors<A>(a.R + d, width, s), store_vectors<A>(s, of.R + d, pitch);
      load_vectors<A>(a.Q + d, width, s), store_vectors<A>(s, of.Q + d, pitch);
    }
  }

  // [sweep]
  void advance_with_tangent(int64_t b, int64_t q, int64_t end, const Block& block, const Arrays& a) const {
    this->for_each_tile(b, q, end, block, a, nullptr, [&](int64_t count, const auto& x, const auto& out) {
      for (int64_t t = 0; t < count; ++t)
        for (int64_t d = 0; d < block.count; d += kLanes<A>) {
          V w[kW], x_t[kG], s[kS], J[kS][kS], before[kS][kS], M[kS][kS], N[kS][kS], R[kS], Q[kS], grown[kS];
          load_vectors<A>(a.w + d, width, w);
          load_vectors(x.at(t) + d, x.part, x_t);
          load_vectors<A>(a.s + d, width, s);
          load_vectors<A>(a.M + d, width, before);
          load_vectors<A>(a.N + d, width, N);
          load_vectors<A>(a.R + d, width, R), load_vectors<A>(a.Q + d, width, Q);
          C::tangent(w, x_t, s, J);
          multiply(J, before, M);
          for (int i = 0; i < kS; ++i)
            for (int j = 0; j < kS; ++j) N[i][j] = larger(magnitude(M[i][j]), N[i][j]);
          amplify(J, R, grown);
          for (int i = 0; i < kS; ++i) R[i] = larger(grown[i], this->rounding(s[i])), Q[i] = larger(R[i], Q[i]);
          store_vectors<A>(s, a.s + d, width);
          store_vectors<A>(M, a.M + d, width);
          store_vectors<A>(N, a.N + d, width);
          store_vectors<A>(R, a.R + d, width), store_vectors<A>(Q, a.Q + d, width);
          store<A>(out.at(t) + d, s[0]);
        }
    });
  }
  // What is too small to matter is 0: subnormal numbers would be slow, and stay.
  static void multiply(const V (&J)[kS][kS], const V (&M)[kS][kS], V (&to)[kS][kS]) {
    for (int i = 0; i < kS; ++i)
      for (int j = 0; j < kS; ++j) {
        V sum = J[i][0] * M[0][j];
        for (int k = 1; k < kS; ++k) sum = madd(J[i][k], M[k][j], sum);
        to[i][j] = select(magnitude(sum) < static_cast<A>(1e-30), V{}, sum);
      }
  }

  void judge_and_correct(int64_t b, const Block& block, int64_t sweeps) const {
    for (int64_t d = 0; d < block.count; d += kLanes<A>) {
      const Mask<V> before = load<A>(accepted(b, block) + d) != 0;
      V largest{};
      const Mask<V> good = judge(b, block, d, largest);
      const V now = select(good, V{} + static_cast<A>(sweeps), V{});
      store<A>(accepted(b, block) + d, select(before, load<A>(accepted(b, block) + d), now));
      store<A>(estimate(b, block) + d, select(before, load<A>(estimate(b, block) + d), largest));
      correct_boundaries(b, block, d, before | good);
    }
  }

  // [estimate]
  Mask<V> judge(int64_t b, const Block& block, int64_t d, V& largest) const {
    Mask<V> good = ~Mask<V>{};
    V e[kS] = {};
    for (int64_t i = 0; i < chunks; ++i) {
      const Chunk of = chunk(b, i, block);
      V s[kS], F[kS], M[kS][kS], N[kS][kS], R[kS], Q[kS], inside[kS], next[kS];
      load_vectors<A>(of.s + d, pitch, s), load_vectors<A>(of.F + d, pitch, F);
      load_vectors<A>(of.M + d, pitch, M), load_vectors<A>(of.N + d, pitch, N);
      load_vectors<A>(of.R + d, pitch, R), load_vectors<A>(of.Q + d, pitch, Q);
      amplify(N, e, inside), amplify(M, e, next);
      const Mask<V> differs = any_error(e);
      for (int j = 0; j < kS; ++j) inside[j] += select(differs, Q[j], V{}), next[j] += select(differs, R[j], V{});
      good &= this->tolerates(e, s) & this->tolerates(inside, s) & this->tolerates(inside, F);
      largest = this->largest(e, this->largest(inside, largest));
      if (i + 1 == chunks) break;
      load_vectors<A>(chunk(b, i + 1, block).s + d, pitch, s);
      for (int j = 0; j < kS; ++j) e[j] = next[j] + magnitude(change(F[j], s[j]));
    }
    return good;
  }

  // [correct] Of channels that are not accepted.
  void correct_boundaries(int64_t b, const Block& block, int64_t d, Mask<V> accepted) const {
    V delta[kS] = {};
    for (int64_t i = 0; i + 1 < chunks; ++i) {
      const Chunk of = chunk(b, i, block), next = chunk(b, i + 1, block);
      V s[kS], F[kS], M[kS][kS], corrected[kS];
      load_vectors<A>(of.F + d, pitch, F), load_vectors<A>(of.M + d, pitch, M);
      load_vectors<A>(next.s + d, pitch, s);
      correct(M, delta, F, corrected);
      for (int j = 0; j < kS; ++j) {
        corrected[j] = select(accepted, s[j], corrected[j]);
        delta[j] = change(corrected[j], s[j]);
      }
      store_vectors<A>(corrected, next.s + d, pitch);
    }
  }

  void finish(int64_t b, const Block& block, int64_t sweeps, const Arrays& a) const {
    A* const sweep = accepted(b, block);
    for (int64_t d = 0; d < block.count; d += kLanes<A>) {
      const V in_sweep = load<A>(sweep + d);
      store<A>(a.marked + d, select(in_sweep == 0, V{} + 1, V{}));
      store<A>(sweep + d, select(in_sweep == 0, V{} + static_cast<A>(sweeps), in_sweep));
    }
    this->store_stats(b, block, sweep, estimate(b, block), a.marked);
    if (!this->any(a.marked, block) || sweeps == chunks) return;
    this->load_weights(block, a.w);
    for (int64_t d = 0; d < block.count; d += kLanes<A>) {
      V s[kS];
      load_vectors<A>(chunk(b, sweeps, block).s + d, pitch, s), store_vectors<A>(s, a.s + d, width);
    }
    this->repair(b, sweeps * tokens, block, a, a.marked);
  }

  static int64_t width_of_block(const FwdParams& p) { return at_most(channels_of_block<A>(p), kWidest); }

  static constexpr int64_t kSweeps = 4;
  static constexpr int64_t kWidest = 128;     // channels
  static constexpr int64_t kGrain = 1 << 13;  // channels of tokens, or of chunks, worth another thread
};

}  // namespace
}  // namespace seqkern::elementwise_rnn

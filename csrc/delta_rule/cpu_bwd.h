// The backward pass: a thread walks through the chunks of a unit forward, for the states that enter them, with the u
// that the forward has kept, and then backward with dS. Internal to cpu.cpp.
//
// States are S^T (values, K). q, with the gradient dn = scale dO, and e, with -beta w, are two readers of one state.
#pragma once
#include "delta_rule/cpu_bwd_call.h"

namespace seqkern::delta_rule {
namespace {

template <class T>
struct Backward : BackwardCall<T> {
  using A = SumOf<T>;
  using Base = BackwardCall<T>;
  using Base::in, Base::p, Base::keys, Base::key_row, Base::per_key, Base::erases, Base::state_size;

  const int64_t stretch = chunks_of_stretch(in);

  explicit Backward(const BwdParams& params) : Base(params) {}

  struct Arrays {
    Keys<A> of;
    KeyGradients<A> d;
    Scores<A> scores;
    TokenDecays<A> decays;
    TokenSums<A> sums;
    KeyScores<A> of_keys;
    typename Call<T>::Packed packed;
    A *beta, *dbeta, *dg;           // (tokens)
    A* erased;                      // (tokens): e_i . (exp(c_i) * (S w_i))
    A *read_q, *read_e, *left;      // (tokens): exp(c_i) and exp(c_C - c_j), with the factors of [norm]
    A *read_rows, *erase_rows;      // (tokens, K): exp(c_i) * q_i and exp(c_i) * e_i, with decays per key
    A* left_rows;                   // (tokens, K): exp(c_C - c_j) * k_j, likewise
    A *v, *u, *dn, *w, *dv;         // (tokens, V)
    A *S_dn, *S_w, *dS_u;           // (tokens, K)
    A *dreads, *derasures;          // (tokens, kChunk): dP and dA, of q_i . k_j and e_i . k_j, decayed
    A *crossing, *of_q_k, *of_e_k;  // (tokens, kChunk): P dP + A dA; gradients of q_i . k_j and e_i . k_j
    A* dut;                         // (values, kChunk): du^T
    A *states, *starts, *dS;        // (chunks of a stretch + 1, heads, S^T), (stretches, heads, S^T), (heads, S^T)
    T *left_operand, *right_operand, *e_left;  // operands
    T *q_right, *e_right, *k_right, *kt_right;

    template <class Take>
    void allocate(const Backward& call, const Take& take) {
      const auto operands = [&](int64_t count) { return Base::take_operands(take, count); };
      const int64_t K = call.keys, row = call.key_row, V = call.max_values, square = kChunk * kChunk;
      const int64_t of_keys_row = kChunk * row, of_values = (kChunk + kSolved) * call.max_row;
      const int64_t wide = at_least(at_least(K, V), kChunk), chunks = ceil_div(longest_run(call.in), kChunk);
      const int64_t slot = call.most_heads * call.state_size;
      of.allocate(call.erases, call.per_key, row, take), d.allocate(row, take), scores.allocate(take);
      decays.allocate(take), sums.allocate(take);
      beta = take(kChunk), dbeta = take(kChunk), dg = take(kChunk), erased = take(kChunk);
      read_q = take(kChunk), read_e = take(kChunk), left = take(kChunk);
      if (call.per_key) {
        of_keys.allocate(2, row, take), packed.allocate(K, take);
        read_rows = take(of_keys_row), erase_rows = take(of_keys_row), left_rows = take(of_keys_row);
      }
      v = take(of_values), u = take(of_values), dn = take(of_values), w = take(of_values), dv = take(of_values);
      S_dn = take(of_keys_row), S_w = take(of_keys_row), dS_u = take(of_keys_row);
      dreads = take(square), derasures = take(square);
      crossing = take(square), of_q_k = take(square), of_e_k = take(square);
      dut = take(round_up(V, kWidestVector) * kChunk);
      states = take((at_most(call.stretch, chunks) + 1) * slot);
      starts = take(ceil_div(chunks, call.stretch) * slot), dS = take(slot);
      left_operand = operands(left_room<T>(wide, wide)), e_left = operands(left_room<T>(kChunk, K));
      right_operand = operands(right_room<T>(wide, wide));
      q_right = operands(right_room<T>(kChunk, K)), e_right = operands(right_room<T>(kChunk, K));
      k_right = operands(right_room<T>(kChunk, K)), kt_right = operands(right_room<T>(K, kChunk));
    }
  };

  void run() const {
    for_each(this->num_units(), [&](int64_t i, const Arrays& a) { walk(this->unit(i), a); });
    if (this->parts == 1) return;
    for_each(in.sequences.batch * this->chunks_of_row(),
             [&](int64_t i, const Arrays& a) { this->reduce(i, a.of, a.d, a.dbeta); });
  }
  template <class Body>
  void for_each(int64_t count, const Body& body) const {
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const Multiplier<T> multiplier;
      const FlushSubnormals flush;
      const InScratch<A, Arrays> arrays(*this);
      arrays.scores.clear_all();
      clear(arrays.of_q_k, kChunk * kChunk), clear(arrays.of_e_k, kChunk * kChunk);
      for (int64_t i = begin; i < end; ++i) body(i, arrays);
      finish_streams();
    });
  }

  void walk(const Unit& u, const Arrays& a) const {
    const Run& run = *u.run;
    for (int64_t h = 0; h < u.heads; ++h)
      this->load_state(in.initial_state, run.initial, u, u.head + h, a.states + h * state_size);
    walk_back(
        this->num_chunks(run), stretch, u.heads * state_size, a.states, a.starts,
        [&](int64_t c, const A* S, A* S_after) { advance(u, this->chunk(run, c), S, S_after, a); },
        [&](const A*) {
          for (int64_t h = 0; h < u.heads; ++h)
            this->load_state(p.dfinal_state, run.final, u, u.head + h, a.dS + h * state_size);
        },
        [&](int64_t c, const A* S) { differentiate_chunk(u, this->chunk(run, c), S, a); });
    if (!p.dinitial_state || run.initial < 0) return;
    for (int64_t h = 0; h < u.heads; ++h)
      this->store_state(a.dS + h * state_size, p.dinitial_state, run.initial, u, u.head + h);
  }

  // [carry] The states after a chunk from those before it.
  void advance(const Unit& u, const Chunk& here, const A* S, A* S_after, const Arrays& a) const {
    const int64_t n = here.count, row = padded<T>(u.values);
    this->load_rows(in.k, here, u.key_head, keys, key_row, Next(1), a.of.k);
    this->load_norms(a.of.k, n, a.of.k_norm);
    Right<T> k = pack_right(a.of.k, key_row, 1, n, keys, a.k_right, true);
    for (int64_t h = 0; h < u.heads; ++h, S += state_size, S_after += state_size) {
      const Next next(u.heads, h, 1);
      this->load_values(p.u, u, here, u.head + h, next, a.u);
      if (per_key) {
        load_key_decays(here, u.head + h, next, a);
        for (int64_t i = 0; i < n; ++i)
          scale_row(a.of.k_norm[i], a.of.k + i * key_row, key_row, a.left_rows + i * key_row);
        this->keys_to_end(a.of_keys.decays, n, a.left_rows);
        k = pack_right(a.left_rows, key_row, 1, n, keys, a.k_right, true);
        for (int64_t i = 0; i < u.values * key_row; i += key_row)
          multiply_row(a.of_keys.total, S + i, key_row, S_after + i);
      } else {
        this->load_decays(here, u.head + h, a.decays);
        for (int64_t j = 0; j < n; ++j) scale_row(a.decays.left[j] * a.of.k_norm[j], a.u + j * row, row, a.u + j * row);
        scale_row(*a.decays.total, S, state_size, S_after);
      }
      multiply(pack_left(a.u, 1, row, u.values, n, a.left_operand), k, S_after, key_row, u.values, keys, n, true);
    }
  }
  void load_key_decays(const Chunk& here, int64_t head, const Next& next, const Arrays& a) const {
    this->load_rows(in.decay, here, head, keys, key_row, next, a.of_keys.decays.step);
    a.of_keys.accumulate(here.count, key_row, false);
  }

  // q, e, k (tokens, K) and k^T of a chunk.
  struct Operands {
    Right<T> q, e, k, kt;
  };
  Operands operands(const A* q, const A* e, const A* k, int64_t n, const Arrays& a) const {
    const Right<T> of_k = pack_right(k, key_row, 1, n, keys, a.k_right, true);
    return {pack_right(q, key_row, 1, n, keys, a.q_right, true),
            e == k ? of_k : pack_right(e, key_row, 1, n, keys, a.e_right, true), of_k,
            pack_right(k, 1, key_row, keys, n, a.kt_right)};
  }

  void differentiate_chunk(const Unit& u, const Chunk& here, const A* S, const Arrays& a) const {
    const int64_t n = here.count;
    this->load_keys(here, u.key_head, a.of);
    clear(a.d.dq, n * key_row), clear(a.d.dk, n * key_row), clear(a.d.de, n * key_row);
    Operands of{};
    if (per_key) {
      this->normalize(n, a.of);
    } else {
      of = operands(a.of.q, a.of.e, a.of.k, n, a);
      this->multiply_keys(pack_left(a.of.q, key_row, 1, n, keys, a.left_operand),
                          pack_left(a.of.e, key_row, 1, n, keys, a.e_left), of.kt, n, a.of);
      clear(a.of_q_k, n * kChunk), clear(a.of_e_k, n * kChunk);
    }
    for (int64_t h = 0; h < u.heads; ++h, S += state_size) {
      const int64_t head = u.head + h;
      const Next next(u.heads, h, -1);
      A* const dS = a.dS + h * state_size;
      this->load_values(in.v, u, here, head, next, a.v);
      this->load_values(p.u, u, here, head, next, a.u);
      this->load_values(p.dO, u, here, head, next, a.dn);
      scale_row(static_cast<A>(in.scale), a.dn, n * padded<T>(u.values), a.dn);
      this->load_beta(here, head, a.beta);
      if (per_key) {
        load_key_decays(here, head, next, a);
        differentiate_per_key(u, here, head, S, dS, a);
      } else {
        this->load_decays(here, head, a.decays);
        differentiate_per_token(u, here, head, of, S, dS, a);
      }
      this->store_numbers(a.dbeta, this->numbers_of_part(u.value_part, 0), here, head);
    }
    if (!per_key) {  // [dq] [de] [dk] among the tokens of the chunk: all heads at once
      const auto add = [&](const A* x, const Right<T>& reader, A* dreader) {
        multiply(pack_left(x, kChunk, 1, n, n, a.left_operand), of.k, dreader, key_row, n, keys, n, true, Band::kLower);
        multiply(pack_left(x, 1, kChunk, n, n, a.left_operand), reader, a.d.dk, key_row, n, keys, n, true,
                 Band::kUpper);
      };
      add(a.of_q_k, of.q, a.d.dq), add(a.of_e_k, of.e, a.d.de);
    }
    this->store_keys(u, here, a.of, a.d);
  }

  // A head with decays per token: decays scale rows of dn, w and u, so that q, e and k serve all heads.
  void differentiate_per_token(const Unit& u, const Chunk& here, int64_t head, const Operands& of, const A* S, A* dS,
                               const Arrays& a) const {
    const int64_t n = here.count, row = padded<T>(u.values);
    this->decay_scores(a.decays, n, a.of, a.beta, a.scores);
    multiply_row(a.decays.read, a.of.q_norm, kChunk, a.read_q);
    multiply_row(a.decays.read, a.of.e_norm, kChunk, a.read_e);
    multiply_row(a.decays.left, a.of.k_norm, kChunk, a.left);
    multiply_dS_k(u, of.kt, dS, n, a);
    for (int64_t j = 0; j < n; ++j) scale_row(a.left[j], a.w + j * row, row, a.w + j * row);
    solve_back(u, here, head, a);
    // [dscores]
    for_each_decay(a.decays.g, n, false, [&](int64_t i, int64_t j, Vec<A> exps, auto) {
      const int64_t ij = i * kChunk + j;
      const Vec<A> dP = load<A>(a.dreads + ij), dA = load<A>(a.derasures + ij),
                   k_norm = exps * load<A>(a.of.k_norm + j);
      store<A>(a.crossing + ij, madd(load<A>(a.scores.reads + ij), dP, load<A>(a.scores.erasures + ij) * dA));
      store<A>(a.of_q_k + ij, madd(a.of.q_norm[i] * k_norm, dP, load<A>(a.of_q_k + ij)));
      store<A>(a.of_e_k + ij, madd(a.of.e_norm[i] * k_norm, dA, load<A>(a.of_e_k + ij)));
    });
    // [dq] [de] [dk] through the state
    multiply_by_states(u, S, dS, n, a);
    A *const of_q = a.sums.of_q, *const of_k = a.sums.of_k;
    sums_of_rows<A>(n, of_q, [&](int64_t i) { return add_and_dot(a.read_q[i], i, a.S_dn, a.of.q, a.d.dq); });
    sums_of_rows<A>(n, a.erased,
                    [&](int64_t i) { return add_and_dot(-a.beta[i] * a.read_e[i], i, a.S_w, a.of.e, a.d.de); });
    sums_of_rows<A>(n, of_k, [&](int64_t j) { return add_and_dot(a.left[j], j, a.dS_u, a.of.k, a.d.dk); });
    for (int64_t i = 0; i < n; ++i) {
      const A erased = a.read_e[i] * a.erased[i];
      a.dbeta[i] -= erased;
      of_q[i] = a.read_q[i] * of_q[i] - a.beta[i] * erased;
      of_k[i] = a.left[i] * of_k[i];
    }
    if (in.form == Decay::kToken) {
      a.sums.add_scores(a.crossing, nullptr, n, false);
      a.sums.differentiate(*a.decays.total * dot(S, dS, state_size), nullptr, n, false, a.dg);
      this->store_numbers(a.dg, this->numbers_of_part(u.value_part, 1), here, head);
    }
    // [dcarry]
    for (int64_t i = 0; i < n; ++i) {
      scale_row(a.read_q[i], a.dn + i * row, row, a.dn + i * row);
      scale_row(-a.beta[i] * a.read_e[i], a.w + i * row, row, a.w + i * row);
    }
    scale_row(*a.decays.total, dS, state_size, dS);
    add_to_dS(u, of, n, dS, a);
  }

  // A head with decays per key: they scale q, e and k.
  void differentiate_per_key(const Unit& u, const Chunk& here, int64_t head, const A* S, A* dS, const Arrays& a) const {
    const int64_t n = here.count, row = padded<T>(u.values);
    const KeyScores<A>& of_keys = a.of_keys;
    copy(a.of.q, n * key_row, a.read_rows), copy(a.of.e, n * key_row, a.erase_rows);
    copy(a.of.k, n * key_row, a.left_rows);
    this->decay_scores(of_keys.decays, n, a.read_rows, a.erase_rows, a.left_rows, a.packed, a.beta, a.scores);
    const Operands of = operands(a.read_rows, a.erase_rows, a.left_rows, n, a);
    multiply_dS_k(u, of.kt, dS, n, a);
    solve_back(u, here, head, a);
    multiply_by_states(u, S, dS, n, a);
    sums_of_rows<A>(n, a.erased,
                    [&](int64_t i) { return dot_lanes(a.erase_rows + i * key_row, a.S_w + i * key_row, key_row); });
    for (int64_t i = 0; i < n; ++i) {
      a.dbeta[i] -= a.erased[i];
      scale_row(-a.beta[i], a.S_w + i * key_row, key_row, a.S_w + i * key_row);
      scale_row(-a.beta[i], a.w + i * row, row, a.w + i * row);
    }
    // [dcarry]
    of_keys.decay_dS(S, dS, u.values, key_row);
    add_to_dS(u, of, n, dS, a);
    // [dq] [de] [dk] [ddecay]
    differentiate_keys(
        *this, {Read<A>{a.of.q, a.S_dn, a.dreads, true, a.d.dq}, Read<A>{a.of.e, a.S_w, a.derasures, false, a.d.de}},
        a.of.k, a.dS_u, n, false, of_keys, a.left_operand, a.right_operand, a.d.dk);
    this->store_key_rows(of_keys.dg, this->decays_of_part(u.value_part), here, head);
  }

  // [du] through the state, not yet decayed by token, in the place of w.
  void multiply_dS_k(const Unit& u, Right<T> kt, const A* dS, int64_t n, const Arrays& a) const {
    multiply(pack_left(dS, key_row, 1, u.values, keys, a.left_operand), kt, a.dut, kChunk, u.values, n, keys, false);
    const int64_t row = padded<T>(u.values);
    if (u.values < row) clear(a.w, n * row);
    transpose_into<A>(a.dut, kChunk, u.values, n, a.w, row);
  }
  // [du] and among the tokens of the chunk; [dsolve], dv; [dscores] dP and dA; [dbeta] but for the state.
  void solve_back(const Unit& u, const Chunk& here, int64_t head, const Arrays& a) const {
    const int64_t n = here.count, row = padded<T>(u.values), whole = round_up(n, kSolved);
    multiply(pack_left(a.scores.reads, 1, kChunk, n, n, a.left_operand),
             pack_right(a.dn, row, 1, n, u.values, a.right_operand, true), a.w, row, n, u.values, n, true,
             Band::kUpper);
    clear(a.w + n * row, (whole - n) * row), clear(a.scores.system + n * kChunk, (whole - n) * kChunk);
    solve<true>(a.scores.system, n, a.w, row);
    for (int64_t i = 0; i < n; ++i) scale_row(a.beta[i], a.w + i * row, row, a.dv + i * row);
    this->store_values(a.dv, p.dv, u, here, head);

    const Right<T> ut = pack_right(a.u, 1, row, u.values, n, a.right_operand);
    this->multiply_lower(pack_left(a.dn, row, 1, n, u.values, a.left_operand), ut, a.dreads, n, u.values);
    this->multiply_lower(pack_left(a.w, row, 1, n, u.values, a.left_operand), ut, a.derasures, n, u.values);
    clear_above(a.dreads, n, 0), clear_above(a.derasures, n, 1);
    sums_of_rows<A>(n, a.dbeta, [&](int64_t i) {
      const int64_t ij = i * kChunk;
      return dot_lanes(a.w + i * row, a.v + i * row, row) - dot_lanes(a.scores.erasures + ij, a.derasures + ij, i);
    });
    for (int64_t i = 0; i < n; ++i) scale_row(-a.beta[i], a.derasures + i * kChunk, i + 1, a.derasures + i * kChunk);
  }
  // Zeros for x_ij (tokens, kChunk) where j + least > i, in the vector of the diagonal: others are not read.
  static void clear_above(A* x, int64_t n, int64_t least) {
    Vec<A> lane{};
    for (int i = 0; i < kLanes<A>; ++i) lane[i] = static_cast<A>(i);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t j = i / kLanes<A> * kLanes<A>;
      A* const at = x + i * kChunk + j;
      store<A>(at, select(lane <= splat(static_cast<A>(i - j - least)), load<A>(at), Vec<A>{}));
    }
  }

  // S dn, S w and dS u by rows of tokens.
  void multiply_by_states(const Unit& u, const A* S, const A* dS, int64_t n, const Arrays& a) const {
    const int64_t row = padded<T>(u.values);
    const auto times = [&](const A* x, const Right<T>& states, A* to) {
      multiply(pack_left(x, row, 1, n, u.values, a.left_operand), states, to, key_row, n, keys, u.values, false);
    };
    const Right<T> of_S = pack_right(S, key_row, 1, u.values, keys, a.right_operand, true);
    times(a.dn, of_S, a.S_dn), times(a.w, of_S, a.S_w);
    times(a.u, pack_right(dS, key_row, 1, u.values, keys, a.right_operand, true), a.dS_u);
  }
  // Of token i: sum += factor x, and x . y.
  Vec<A> add_and_dot(A factor, int64_t i, const A* x, const A* y, A* sum) const {
    add_row(factor, x + i * key_row, key_row, sum + i * key_row);
    return dot_lanes(x + i * key_row, y + i * key_row, key_row);
  }
  // dS += dn^T q + w^T e
  void add_to_dS(const Unit& u, const Operands& of, int64_t n, A* dS, const Arrays& a) const {
    const int64_t row = padded<T>(u.values);
    multiply(pack_left(a.dn, 1, row, u.values, n, a.left_operand), of.q, dS, key_row, u.values, keys, n, true);
    multiply(pack_left(a.w, 1, row, u.values, n, a.left_operand), of.e, dS, key_row, u.values, keys, n, true);
  }
};

}  // namespace
}  // namespace seqkern::delta_rule

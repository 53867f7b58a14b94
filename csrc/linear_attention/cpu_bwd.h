// The backward pass. A unit of work is a run, or where there are few a segment of one, and some value heads of one key
// head: a thread walks through its chunks forward, for the states that enter them, and then backward with dS. Internal
// to cpu.cpp.
//
// States are S^T (width, K): their rows are values, whose last one is z where there is a normalizer; v has a column of
// ones there, and dn a column of de, so that z and e need no equations of their own.
#pragma once
#include "linear_attention/cpu_bwd_gates.h"

namespace seqkern::linear_attention {
namespace {

template <class T>
struct Backward : GateGradients<T> {
  using A = SumOf<T>;
  using Base = GateGradients<T>;
  using Base::in, Base::p, Base::key_row, Base::value_row, Base::per_key;
  using Base::width, Base::keys, Base::normalized, Base::state_size, Base::most_heads;

  const int64_t stretch = chunks_of_stretch(in);

  explicit Backward(const BwdParams& params) : Base(params) {}

  struct Arrays {
    typename Base::Arrays of_gates;
    KeyScores<A> of_keys;
    A *q, *k, *dq, *dk;                // (tokens, K); dq and dk are sums over heads
    A *read_q, *left_k;                // (tokens, K): exp(r_i) * q_i and exp(c_C - c_j) * k_j, with decays per key
    A *S_dn, *dS_v;                    // (tokens, K)
    A *bonus, *bonus_dscore;           // (K), (tokens)
    A *v, *dout, *dn, *o, *gate, *dv;  // (tokens, width)
    A* scaled;                         // (tokens, width): rows of v or dn times a decay
    A *products, *scores, *dscores;    // (tokens, kChunk): q k^T, P, dP
    A* of_keys_scores;                 // (tokens, kChunk): sum over heads of w_j dP_ij exp(r_i - c_j)
    A* dvt;                            // (width, kChunk): dv^T
    A *states, *starts;                // (chunks of a stretch + 1, heads, S^T), (stretches, heads, S^T)
    A *dS, *decays, *m0;               // (heads, S^T), (heads, K), (heads)
    T *left, *right, *q_right, *k_right, *kt_right;

    template <class Take>
    void allocate(const Backward& call, const Take& take) {
      const auto operands = [&](int64_t count) { return Base::take_operands(take, count); };
      const int64_t of_keys_row = kChunk * call.key_row, of_values = kChunk * call.value_row;
      const int64_t square = kChunk * kChunk, wide = at_least(call.width, kChunk);
      const int64_t chunks = ceil_div(longest_run(call.in), kChunk), slot = call.most_heads * call.state_size;
      of_gates.allocate(call, take);
      if (call.per_key) of_keys.allocate(1, call.key_row, take);
      q = take(of_keys_row), k = take(of_keys_row), dq = take(of_keys_row), dk = take(of_keys_row);
      read_q = take(of_keys_row), left_k = take(of_keys_row), S_dn = take(of_keys_row), dS_v = take(of_keys_row);
      bonus = take(call.key_row), bonus_dscore = take(kChunk);
      v = take(of_values), dout = take(of_values), dn = take(of_values), o = take(of_values);
      gate = take(of_values), dv = take(of_values), scaled = take(of_values);
      products = take(square), scores = take(square), dscores = take(square), of_keys_scores = take(square);
      dvt = take(round_up(call.width, kWidestVector) * kChunk);
      states = take((at_most(call.stretch, chunks) + 1) * slot);
      starts = take(ceil_div(chunks, call.stretch) * slot);
      dS = take(slot), decays = take(call.most_heads * call.key_row), m0 = take(call.most_heads);
      left = operands(left_room<T>(wide, at_least(wide, call.keys)));
      right = operands(right_room<T>(wide, at_least(wide, call.keys)));
      q_right = operands(right_room<T>(kChunk, call.keys)), k_right = operands(right_room<T>(kChunk, call.keys));
      kt_right = operands(right_room<T>(call.keys, kChunk));
    }
  };

  void run() const {
    if (this->segment > 0) {
      for_each_unit(this->num_units(), [&](int64_t i, const Arrays& a) { make_element(this->unit(i), a); });
      for_each_unit(in.num_runs * in.heads * this->parts, [&](int64_t i, const Arrays& a) { pass_through(i, a); });
    }
    for_each_unit(this->num_units(), [&](int64_t i, const Arrays& a) { differentiate(this->unit(i), a); });
    if (this->parts > 1) this->reduce_keys();
    this->reduce_parameters();
  }
  template <class Body>
  void for_each_unit(int64_t count, const Body& body) const {
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const Multiplier<T> multiplier;
      const FlushSubnormals flush;
      const InScratch<A, Arrays> arrays(*this);
      clear(arrays.scores, kChunk * kChunk);
      for (int64_t i = begin; i < end; ++i) body(i, arrays);
      finish_streams();
    });
  }

  void differentiate(const Unit& u, const Arrays& a) const {
    this->clear_sums(u.heads, a.of_gates);
    if (u.run->padding)
      clear_gradients(u, a);
    else
      walk(u, a);
    for (int64_t h = 0; h < u.heads; ++h) this->store_sums(u, h, a.of_gates);
    this->store_dbonus(u, a.of_gates);
  }

  void walk(const Unit& u, const Arrays& a) const {
    enter(u, a);
    if (in.read_previous) this->load_bonus(u.key_head, a.bonus);
    walk_back(
        u.chunks, stretch, u.heads * state_size, a.states, a.starts,
        [&](int64_t c, const A* S, A* S_after) { advance(u, u.first + c, S, S_after, a); },
        [&](const A* S) { enter_backward(u, S, a); },
        [&](int64_t c, const A* S) { differentiate_chunk(u, u.first + c, S, a); });
    if (u.begins) store_dinitial(u, a);
  }

  // States before the first chunk.
  void enter(const Unit& u, const Arrays& a) const {
    for (int64_t h = 0; h < u.heads; ++h) {
      A* const S = a.states + h * state_size;
      this->load_state(in.initial_state, u.run->initial, u.head + h, false, S, a.m0 + h);
      if (this->segment > 0) copy(this->element(u.segment, u.head + h).S, state_size, S);
    }
  }
  // dS after the last chunk, and of the maximum the gradient that those states are not responsible for.
  void enter_backward(const Unit& u, const A* S, const Arrays& a) const {
    for (int64_t h = 0; h < u.heads; ++h) {
      A* const dS = a.dS + h * state_size;
      if (this->segment > 0) {
        const auto element = this->element(u.segment, u.head + h);
        copy(element.dS, state_size, dS);
        a.of_gates.flow[h] = *element.dm;
      } else {
        a.of_gates.flow[h] = load_dfinal(u, u.head + h, S + h * state_size, dS);
      }
    }
  }
  A load_dfinal(const Unit& u, int64_t head, const A* S, A* dS) const {
    A dm = 0;
    this->load_state(p.dfinal_state, u.run->final, head, true, dS, &dm);
    return in.gates.form == Form::kExp && u.chunks > 0 ? dm - dot(dS, S, state_size) : dm;
  }

  // [dcarry] past the first token. An empty initial state has no gradient.
  void store_dinitial(const Unit& u, const Arrays& a) const {
    const State& to = p.dinitial_state;
    if (!to || u.run->initial < 0) return;
    for (int64_t h = 0; h < u.heads; ++h) {
      if (to.m && a.m0[h] == kEmpty<A>) continue;
      const A* const dS = a.dS + h * state_size;
      const A through = to.m && u.chunks > 0 ? dot(dS, a.states + h * state_size, state_size) : A{0};
      this->store_state(dS, through + a.of_gates.flow[h], to, u.run->initial, u.head + h);
    }
  }

  // [carry] The states after chunk c from those before it, which may be the same. `decays` (heads, key_row) collect how
  // it decays them.
  void advance(const Unit& u, int64_t c, const A* S, A* S_after, const Arrays& a, A* decays = nullptr) const {
    const Chunk here = this->chunk(u, c);
    const int64_t n = here.count;
    this->load_keys(in.k, here, u.key_head, Next(1), a.k);
    Right<T> k = pack_right(a.k, key_row, 1, n, keys, a.k_right, true);
    for (int64_t h = 0; h < u.heads; ++h, S += state_size, S_after += state_size) {
      const Next next(u.heads, h, 1);
      this->load_v(here, u.head + h, next, a.v);
      const A* v = a.v;
      if (per_key) {
        load_key_gates(here, u.head + h, next, a);
        copy(a.k, n * key_row, a.left_k);
        this->keys_to_end(a.of_keys.decays, n, a.left_k);
        k = pack_right(a.left_k, key_row, 1, n, keys, a.k_right, true);
        for (int64_t i = 0; i < width * key_row; i += key_row)
          multiply_row(a.of_keys.total, S + i, key_row, S_after + i);
        if (decays) multiply_row(a.of_keys.total, decays + h * key_row, key_row, decays + h * key_row);
      } else {
        const TokenGates<A>& gates = a.of_gates.gates;
        this->load_gates_of_chunk(here, u.head + h, a.m0[h], gates);
        for (int64_t j = 0; j < n; ++j)
          scale_row(gates.w[j] * gates.left[j], a.v + j * value_row, value_row, a.scaled + j * value_row);
        v = a.scaled;
        scale_row(*gates.total, S, state_size, S_after);
        if (decays) scale_row(*gates.total, decays + h * key_row, key_row, decays + h * key_row);
      }
      multiply(pack_left(v, 1, value_row, width, n, a.left), k, S_after, key_row, width, keys, n, true);
    }
  }
  void load_key_gates(const Chunk& here, int64_t head, const Next& next, const Arrays& a) const {
    this->load_keys(in.gates.decay, here, head, next, a.of_keys.decays.step);
    a.of_keys.accumulate(here.count, key_row, in.read_previous);
  }

  void differentiate_chunk(const Unit& u, int64_t c, const A* S, const Arrays& a) const {
    const Chunk here = this->chunk(u, c);
    const int64_t n = here.count;
    this->load_keys(in.q, here, u.key_head, Next(-1), a.q);
    this->load_keys(in.k, here, u.key_head, Next(-1), a.k);
    clear(a.dq, n * key_row), clear(a.dk, n * key_row), clear(a.bonus_dscore, kChunk);
    Operands of{};
    if (!per_key) {
      of = operands(a.q, a.k, n, a);
      this->multiply_lower(pack_left(a.q, key_row, 1, n, keys, a.left), of.kt, a.products, n, keys);
      clear(a.of_keys_scores, n * kChunk);
    }
    for (int64_t h = 0; h < u.heads; ++h, S += state_size) {
      const int64_t head = u.head + h;
      const Next next(u.heads, h, -1);
      A* const dS = a.dS + h * state_size;
      this->load_v(here, head, next, a.v);
      if (per_key)
        load_key_gates(here, head, next, a);
      else
        this->load_gates_of_chunk(here, head, a.m0[h], a.of_gates.gates);
      load_dout(here, head, h, next, a);
      const Left<T> dn = pack_left(a.dn, value_row, 1, n, width, a.left);
      this->multiply_lower(dn, pack_right(a.v, 1, value_row, width, n, a.right), a.dscores, n, width);
      if (in.read_previous)
        for (int64_t i = 0; i < n; ++i) a.bonus_dscore[i] += a.dscores[i * kChunk + i];
      if (per_key)
        differentiate_per_key(here, head, S, dS, a);
      else
        differentiate_per_token(here, head, h, of, S, dS, a);
    }
    if (!per_key) {  // [dq] [dk] among the tokens of the chunk: all heads at once
      const A* const x = a.of_keys_scores;
      multiply(pack_left(x, kChunk, 1, n, n, a.left), of.k, a.dq, key_row, n, keys, n, true, Band::kLower);
      multiply(pack_left(x, 1, kChunk, n, n, a.left), of.q, a.dk, key_row, n, keys, n, true, Band::kUpper);
    }
    if (in.read_previous) differentiate_bonus(n, a);
    this->store_keys(a.dq, this->keys_of_part(u.part, 0), here, u.key_head);
    this->store_keys(a.dk, this->keys_of_part(u.part, 1), here, u.key_head);
  }

  struct Operands {
    Right<T> q, k, kt;  // (tokens, K), (tokens, K), (K, tokens)
  };
  Operands operands(const A* q, const A* k, int64_t n, const Arrays& a) const {
    return {pack_right(q, key_row, 1, n, keys, a.q_right, true), pack_right(k, key_row, 1, n, keys, a.k_right, true),
            pack_right(k, 1, key_row, keys, n, a.kt_right)};
  }

  // [dout] do and dn of a chunk; dgate and dD.
  void load_dout(const Chunk& here, int64_t head, int64_t h, const Next& next, const Arrays& a) const {
    const int64_t n = here.count;
    this->load_values(p.dy, here, head, next, a.dout);
    if (in.gate || normalized) this->load_values(p.o, here, head, next, a.o);
    if (in.skip) this->load_skip(head, a.of_gates.D);
    if (in.gate) {
      this->load_values(in.gate, here, head, next, a.gate);
      for (int64_t i = 0; i < n * value_row; i += value_row)
        this->differentiate_gate(a.o + i, a.v + i, a.of_gates.D, value_row, a.dout + i, a.gate + i);
      this->store_values(a.gate, p.dgate, here, head);
    }
    if (in.skip) this->add_dskip(h, n, value_row, a.v, a.dout, a.of_gates);
    if (normalized)
      sums_of_rows<A>(n, a.of_gates.dout_o,
                      [&](int64_t i) { return dot_lanes(a.dout + i * value_row, a.o + i * value_row, value_row); });
    this->differentiate_normalizer(here, head, a.of_gates);
    for (int64_t i = 0; i < n; ++i) {
      A* const dn = a.dn + i * value_row;
      scale_row(a.of_gates.dn_of_dout[i], a.dout + i * value_row, value_row, dn);
      if (normalized) dn[in.size] = a.of_gates.de[i];
    }
  }

  // A head with decays per token: decays and weights scale rows of dn and v, so that q and k serve all heads.
  void differentiate_per_token(const Chunk& here, int64_t head, int64_t h, const Operands& of, const A* S, A* dS,
                               const Arrays& a) const {
    const int64_t n = here.count;
    const TokenGates<A>& gates = a.of_gates.gates;
    const TokenSums<A>& sums = a.of_gates.sums;
    // [scores] [dscores]
    for_each_decay(gates.g, n, in.read_previous, [&](int64_t i, int64_t j, Vec<A> decays, auto mask) {
      const int64_t ij = i * kChunk + j;
      const Vec<A> zero{}, dscores = select(mask, load<A>(a.dscores + ij), zero), w = load<A>(gates.w + j);
      const Vec<A> unweighted = select(mask, decays * load<A>(a.products + ij), zero);
      store<A>(a.scores + ij, unweighted * w);
      store<A>(a.dscores + ij, unweighted * dscores);
      const Vec<A> of_keys = select(mask, decays * w * dscores, zero);
      store<A>(a.of_keys_scores + ij, load<A>(a.of_keys_scores + ij) + of_keys);
    });
    sums.add_scores(a.dscores, gates.w, n, in.read_previous);
    if (in.read_previous) add_bonus(n, a);
    multiply_dS_k(of.kt, dS, n, a);
    for (int64_t j = 0; j < n; ++j)
      scale_row(gates.w[j] * gates.left[j], a.dv + j * value_row, value_row, a.dv + j * value_row);
    finish_dv(here, head, a);
    // [dk] through the state
    for (int64_t j = 0; j < n; ++j) scale_row(gates.left[j], a.v + j * value_row, value_row, a.scaled + j * value_row);
    multiply_by_state(a.scaled, dS, n, a.dS_v, a);
    sums_of_rows<A>(n, sums.of_k, [&](int64_t j) { return add_and_dot(gates.w[j], j, a.dS_v, a.k, a.dk); });
    // [dq] through the state
    for (int64_t i = 0; i < n; ++i) scale_row(gates.read[i], a.dn + i * value_row, value_row, a.scaled + i * value_row);
    multiply_by_state(a.scaled, S, n, a.S_dn, a);
    sums_of_rows<A>(n, sums.of_q, [&](int64_t i) { return add_and_dot(A{1}, i, a.S_dn, a.q, a.dq); });
    // [dcarry]
    const A both = *gates.total * dot(S, dS, state_size);
    scale_row(*gates.total, dS, state_size, dS);
    multiply(pack_left(a.scaled, 1, value_row, width, n, a.left), of.q, dS, key_row, width, keys, n, true);
    this->differentiate_gates(here, head, h, both, a.of_gates);
  }

  // A head with decays per key: they scale q and k.
  void differentiate_per_key(const Chunk& here, int64_t head, const A* S, A* dS, const Arrays& a) const {
    const int64_t n = here.count;
    const KeyScores<A>& of_keys = a.of_keys;
    copy(a.q, n * key_row, a.read_q), copy(a.k, n * key_row, a.left_k);
    this->scores_per_key(of_keys.decays, n, in.read_previous, {{a.read_q, a.scores}}, a.left_k, a.of_gates.packed);
    if (in.read_previous) add_bonus(n, a);
    const Operands of = operands(a.read_q, a.left_k, n, a);
    multiply_dS_k(of.kt, dS, n, a);
    finish_dv(here, head, a);
    // [dk] and [dq] through the state, not yet decayed
    multiply_by_state(a.v, dS, n, a.dS_v, a);
    multiply_by_state(a.dn, S, n, a.S_dn, a);
    of_keys.decay_dS(S, dS, width, key_row);
    // [dcarry]
    multiply(pack_left(a.dn, 1, value_row, width, n, a.left), of.q, dS, key_row, width, keys, n, true);
    differentiate_keys(*this, {Read<A>{a.q, a.S_dn, a.dscores, !in.read_previous, a.dq}}, a.k, a.dS_v, n,
                       in.read_previous, of_keys, a.left, a.right, a.dk);
    this->store_keys(of_keys.dg, p.ddecay, here, head);
  }

  // [dv] through the state, not yet decayed by token
  void multiply_dS_k(Right<T> kt, const A* dS, int64_t n, const Arrays& a) const {
    multiply(pack_left(dS, key_row, 1, width, keys, a.left), kt, a.dvt, kChunk, width, n, keys, false);
    transpose_into<A>(a.dvt, kChunk, width, n, a.dv, value_row);
  }
  // [dv] and among the tokens of the chunk, and of [skip]
  void finish_dv(const Chunk& here, int64_t head, const Arrays& a) const {
    const int64_t n = here.count;
    const Right<T> dn = pack_right(a.dn, value_row, 1, n, width, a.right, true);
    multiply(pack_left(a.scores, 1, kChunk, n, n, a.left), dn, a.dv, value_row, n, width, n, true, Band::kUpper);
    for (int64_t i = 0; in.skip && i < n * value_row; i += value_row)
      for (int64_t j = 0; j < value_row; j += kLanes<A>) {
        const Vec<A> D = load<A>(a.of_gates.D + j), dv = load<A>(a.dv + i + j);
        store<A>(a.dv + i + j, madd(D, load<A>(a.dout + i + j), dv));
      }
    this->store_values(a.dv, p.dv, here, head);
  }

  // to (tokens, K) = x S^T, of x (tokens, width)
  void multiply_by_state(const A* x, const A* S, int64_t n, A* to, const Arrays& a) const {
    const Left<T> left = pack_left(x, value_row, 1, n, width, a.left);
    multiply(left, pack_right(S, key_row, 1, width, keys, a.right, true), to, key_row, n, keys, width, false);
  }
  // Of token i: sum += factor x, and x . y.
  Vec<A> add_and_dot(A factor, int64_t i, const A* x, const A* y, A* sum) const {
    add_row(factor, x + i * key_row, key_row, sum + i * key_row);
    return dot_lanes(x + i * key_row, y + i * key_row, key_row);
  }

  // The diagonal of [scores] that read_previous has, and its gradients from dP_ii summed over heads.
  void add_bonus(int64_t n, const Arrays& a) const {
    A* const diagonal = a.of_gates.diagonal;
    this->multiply_bonus(a.q, a.k, a.bonus, n, diagonal);
    for (int64_t i = 0; i < n; ++i) a.scores[i * kChunk + i] = diagonal[i];
  }
  void differentiate_bonus(int64_t n, const Arrays& a) const {
    for (int64_t i = 0; i < n; ++i) {
      const Vec<A> dscore = splat(a.bonus_dscore[i]);
      for (int64_t k = 0; k < key_row; k += kLanes<A>) {
        const int64_t at = i * key_row + k;
        const Vec<A> q = load<A>(a.q + at), of_k = load<A>(a.k + at), u = load<A>(a.bonus + k);
        store<A>(a.dq + at, madd(dscore, u * of_k, load<A>(a.dq + at)));
        store<A>(a.dk + at, madd(dscore, u * q, load<A>(a.dk + at)));
        A* const dbonus = a.of_gates.dbonus + k;
        store<A>(dbonus, madd(dscore, q * of_k, load<A>(dbonus)));
      }
    }
  }

  void clear_gradients(const Unit& u, const Arrays& a) const {
    clear(a.scaled, kChunk * value_row), clear(a.dq, kChunk * key_row);
    for (int64_t c = 0; c < u.chunks; ++c) {
      const Chunk here = this->chunk(u, c);
      this->store_keys(a.dq, this->keys_of_part(u.part, 0), here, u.key_head);
      this->store_keys(a.dq, this->keys_of_part(u.part, 1), here, u.key_head);
      for (int64_t head = u.head; head < u.head + u.heads; ++head) {
        this->store_values(a.scaled, p.dv, here, head);
        if (p.dgate) this->store_values(a.scaled, p.dgate, here, head);
        if (per_key)
          this->store_keys(a.dq, p.ddecay, here, head);
        else
          this->clear_gate_gradients(here, head, a.of_gates);
      }
    }
  }

  // ---- segments: all elements side by side, then in order what passes through them, then all gradients side by side

  void make_element(const Unit& u, const Arrays& a) const {
    if (u.run->padding) return;
    A* const S = a.states;
    enter(u, a), clear(S, u.heads * state_size), clear(a.dS, u.heads * state_size);
    this->clear_sums(u.heads, a.of_gates);
    fill(a.decays, u.heads * key_row, A{1});
    for (int64_t c = u.first; c < u.first + u.chunks; ++c) advance(u, c, S, S, a, a.decays);
    for (int64_t h = 0; h < u.heads; ++h) {
      A passes = 1;
      a.of_gates.flow[h] = 0;
      for (int64_t c = u.first + u.chunks - 1; c >= u.first; --c) send_back(u, c, h, &passes, a);
      const auto element = this->element(u.segment, u.head + h);
      copy(S + h * state_size, state_size, element.S);
      copy(a.dS + h * state_size, state_size, element.dS);
      copy(a.decays + h * key_row, key_row, element.decay);
      *element.dm = a.of_gates.flow[h], *element.passes = passes;
    }
  }

  // [dcarry] of head h in chunk c, and what reaches the maximum.
  void send_back(const Unit& u, int64_t c, int64_t h, A* passes, const Arrays& a) const {
    const Chunk here = this->chunk(u, c);
    const int64_t n = here.count, head = u.head + h;
    const Next next(-1);
    A *const dS = a.dS + h * state_size, *const q = a.q;
    this->load_keys(in.q, here, u.key_head, next, q);
    this->load_v(here, head, next, a.v);
    if (per_key) {
      load_key_gates(here, head, next, a);
      load_dout(here, head, h, next, a);
      a.of_keys.read(n, key_row, q);
      for (int64_t i = 0; i < width * key_row; i += key_row) multiply_row(a.of_keys.total, dS + i, key_row, dS + i);
    } else {
      const TokenGates<A>& gates = a.of_gates.gates;
      this->load_gates_of_chunk(here, head, a.m0[h], gates);
      load_dout(here, head, h, next, a);
      for (int64_t i = 0; i < n; ++i) scale_row(gates.read[i], a.dn + i * value_row, value_row, a.dn + i * value_row);
      scale_row(*gates.total, dS, state_size, dS);
      if (in.gates.form == Form::kExp) this->flow_back(n, a.of_gates, a.of_gates.flow + h, passes);
    }
    const Left<T> dn = pack_left(a.dn, 1, value_row, width, n, a.left);
    multiply(dn, pack_right(q, key_row, 1, n, keys, a.q_right, true), dS, key_row, width, keys, n, true);
  }

  // Of a run and part: elements become what passes.
  void pass_through(int64_t i, const Arrays& a) const {
    const int64_t index = i / this->parts / in.heads;
    int64_t first = 0;
    for (int64_t r = 0; r < index; ++r) first += segments_of_run(in.runs[r], this->segment);
    const int64_t count = segments_of_run(in.runs[index], this->segment), of_segment = in.heads * this->parts;
    const Unit u = this->unit(first * of_segment + i % of_segment);
    if (u.run->padding) return;
    for (int64_t h = 0; h < u.heads; ++h) {
      const int64_t head = u.head + h;
      A *const S = a.states, *const dS = a.dS;
      this->load_state(in.initial_state, u.run->initial, head, false, S, a.m0);
      for (int64_t s = 0; s < count; ++s) pass(this->element(first + s, head), S, this->element(first + s, head).S);
      A flow = load_dfinal(u, head, S, dS);
      for (int64_t s = count - 1; s >= 0; --s) {
        const auto element = this->element(first + s, head);
        pass(element, dS, element.dS);
        const A own = *element.dm;
        *element.dm = flow;
        flow = own + *element.passes * flow;
      }
    }
  }
  // x becomes decay x + own, which becomes what x was.
  void pass(const typename Base::Element& element, A* x, A* own) const {
    for (int64_t i = 0; i < width; ++i)
      for (int64_t k = 0; k < key_row; k += kLanes<A>) {
        const int64_t at = i * key_row + k;
        const Vec<A> before = load<A>(x + at);
        store<A>(x + at, madd(load<A>(element.decay + k), before, load<A>(own + at)));
        store<A>(own + at, before);
      }
  }
};

}  // namespace
}  // namespace seqkern::linear_attention

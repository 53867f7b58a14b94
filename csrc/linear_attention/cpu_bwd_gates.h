// The backward of gates, outputs and parameters: numbers per token and value head, and their sums over time. Internal
// to cpu.cpp.
#pragma once
#include "linear_attention/cpu_bwd_call.h"

namespace seqkern::linear_attention {
namespace {

template <class T>
struct GateGradients : BackwardCall<T> {
  using A = SumOf<T>;
  using Base = BackwardCall<T>;
  using Base::in, Base::p, Base::step, Base::key_row, Base::value_row, Base::parts, Base::segments;

  const int64_t dD_row = round_up(in.size + 1, kWidestVector);
  const int64_t numbers = this->sizes.of_head;

  explicit GateGradients(const BwdParams& params) : Base(params) {}

  struct Arrays {
    TokenGates<A> gates;
    typename Call<T>::Packed packed;
    TokenSums<A> sums;
    A *dout_o, *dn_of_dout, *de;  // (tokens): do . o, dn / do, de
    A* diagonal;                  // (tokens): q_i . (bonus * k_i)
    A* dm;                        // (tokens): of m_t itself
    A *dg, *dw, *numbers;         // (tokens)
    A *D, *dD;                    // (V), (heads, V)
    A* dbonus;                    // (K)
    A* of_head;                   // (heads, kHeadNumbers): dA, dbias, ddecay
    A* flow;                      // (heads): [dgates] T, what reaches the maximum before the tokens seen

    template <class Take>
    void allocate(const GateGradients& call, const Take& take) {
      gates.allocate(take), packed.allocate(call.in.keys, take), sums.allocate(take);
      dout_o = take(kChunk), dn_of_dout = take(kChunk), de = take(kChunk), dm = take(kChunk);
      diagonal = take(kChunk);
      dg = take(kChunk), dw = take(kChunk), numbers = take(kChunk);
      D = take(call.dD_row), dD = take(call.most_heads * call.dD_row), dbonus = take(call.key_row);
      of_head = take(call.most_heads * kHeadNumbers), flow = take(call.most_heads);
    }
  };

  void load_gates_of_chunk(const Chunk& chunk, int64_t head, A m0, const TokenGates<A>& gates) const {
    if (in.gates.form == Form::kExp)
      *gates.m =
          chunk.first == 0 ? m0 : static_cast<const A*>(p.maxima)[this->number(chunk, head) - step * in.value_heads];
    this->load_gates(chunk, head, gates);
  }

  // ---- [dout]

  void load_skip(int64_t head, A* D) const {
    clear(D, dD_row);
    visit_dtype(in.skip.dtype, [&]<class X>() {
      convert(static_cast<const X*>(in.skip.data) + head * in.skip_h, in.skip_v, in.size, D);
    });
  }

  // Of a token's values: dout becomes do, gate becomes dgate.
  void differentiate_gate(const A* o, const A* v, const A* D, int64_t row, A* dout, A* gate) const {
    for (int64_t j = 0; j < row; j += kLanes<A>) {
      const Vec<A> dy = load<A>(dout + j), x = load<A>(gate + j);
      const Vec<A> before = in.skip ? madd(load<A>(D + j), load<A>(v + j), load<A>(o + j)) : load<A>(o + j);
      store<A>(dout + j, dy * silu(x));
      store<A>(gate + j, dy * before * silu_derivative(x));
    }
  }

  void add_dskip(int64_t h, int64_t count, int64_t row, const A* v, const A* dout, const Arrays& a) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < row; j += kLanes<A>) {
        A* const dD = a.dD + h * dD_row + j;
        store<A>(dD, madd(load<A>(dout + i * row + j), load<A>(v + i * row + j), load<A>(dD)));
      }
  }

  // dn / do, de, and the gradient of m_t itself, of do . o.
  void differentiate_normalizer(const Chunk& chunk, int64_t head, const Arrays& a) const {
    const A scale = static_cast<A>(in.scale), eps = static_cast<A>(in.eps);
    if (in.normalizer == Normalizer::kNone) return fill(a.dn_of_dout, kChunk, scale);
    const A* e = static_cast<const A*>(p.denominators) + this->number(chunk, head);
    for (int64_t i = 0; i < chunk.count; ++i, e += step * in.value_heads) {
      if (in.normalizer == Normalizer::kSum) {
        const A d = *e + eps;
        a.dn_of_dout[i] = scale / d, a.de[i] = -a.dout_o[i] / d;
        continue;
      }
      const A m = a.gates.m[i + 1], scaled = scale * *e, magnitude = scaled < 0 ? -scaled : scaled;
      if (m == kEmpty<A>) {
        a.dn_of_dout[i] = a.de[i] = a.dm[i] = 0;
        continue;
      }
      const A floor = static_cast<A>(__builtin_exp(static_cast<double>(-m)));
      const A d = (magnitude > floor || magnitude != magnitude ? magnitude : floor) + eps, share = -a.dout_o[i] / d;
      a.dn_of_dout[i] = scale / d;
      a.de[i] = magnitude <= floor ? 0 : share * (scaled < 0 ? -scale : scale);  // NaN comes through
      a.dm[i] = share * eps;
    }
  }

  // ---- [ddecay] [dweight] [dgates]

  // `both`: what dS and S before the chunk have in common after it.
  void differentiate_gates(const Chunk& chunk, int64_t head, int64_t h, A both, const Arrays& a) const {
    const int64_t count = chunk.count;
    const TokenSums<A>& sums = a.sums;
    sums.differentiate(both, a.gates.w, count, in.read_previous, a.dg);
    for (int64_t t = 0; t < count; ++t) a.dw[t] = sums.columns[t] + sums.of_k[t];
    if (in.gates.form == Form::kToken) store_ddecay(chunk, head, h, a.dg, a);
    if (in.gates.form == Form::kDelta) differentiate_delta(chunk, head, h, a);
    if (in.gates.form == Form::kExp) differentiate_exponential(chunk, head, h, a);
  }

  void differentiate_delta(const Chunk& chunk, int64_t head, int64_t h, const Arrays& a) const {
    const Gates& gates = in.gates;
    A of_head = 0, bias = 0;
    load_array(gates.A, head, 1, &of_head);
    if (gates.bias) load_array(gates.bias, head, 1, &bias);
    const Vec<A> low = splat(static_cast<A>(gates.low)), high = splat(static_cast<A>(gates.high));
    A* const sums = a.of_head + h * kHeadNumbers;
    this->load_numbers(gates.decay, chunk, head, a.numbers);
    for (int64_t i = chunk.count; i < kChunk; ++i) a.numbers[i] = a.dg[i] = a.dw[i] = 0;
    Vec<A> dA{}, dbias{};
    for (int64_t i = 0; i < chunk.count; i += kLanes<A>) {
      const Vec<A> x = load<A>(a.numbers + i) + bias, delta = gates.softplus ? softplus(x) : x;
      const Vec<A> dg = load<A>(a.dg + i), ddelta = madd(dg, splat(of_head), load<A>(a.dw + i));
      const Vec<A> slope = gates.softplus ? select(x > A{20}, Vec<A>{} + 1, sigmoid(x)) : Vec<A>{} + 1;
      const Vec<A> ddecay = select((delta < low) | (delta > high), Vec<A>{}, ddelta * slope);
      store<A>(a.dw + i, ddecay);
      dA = madd(dg, load<A>(a.gates.w + i), dA), dbias += ddecay;
    }
    sums[0] += sum_of_lanes<A>(dA), sums[1] += sum_of_lanes<A>(dbias);
    store_ddecay(chunk, head, h, a.dw, a);
  }

  static bool is_empty(const TokenGates<A>& gates, int64_t t) { return gates.m[t + 1] == kEmpty<A>; }
  static bool is_kept(const TokenGates<A>& gates, int64_t t) { return gates.f[t] + gates.m[t] == gates.m[t + 1]; }

  // What reaches the maximum before a chunk, of that after it and of its own tokens; `passes` becomes 0 if the former
  // does not get there.
  void flow_back(int64_t count, const Arrays& a, A* flow, A* passes) const {
    for (int64_t t = count - 1; t >= 0; --t) {
      const bool passing = !is_empty(a.gates, t) && is_kept(a.gates, t);
      *flow = passing ? *flow + a.dm[t] : 0;
      if (!passing) *passes = 0;
    }
  }

  // The gradient of a maximum goes to the term that was it: to the input, or on to f and the maximum before.
  void differentiate_exponential(const Chunk& chunk, int64_t head, int64_t h, const Arrays& a) const {
    const TokenGates<A>& gates = a.gates;
    A dm = a.flow[h];
    for (int64_t t = chunk.count - 1; t >= 0; --t) {
      const bool empty = is_empty(gates, t), kept = is_kept(gates, t);
      dm = empty ? 0 : dm + a.dm[t];
      a.dg[t] = empty ? 0 : a.dg[t] + (kept ? dm : 0);
      a.dw[t] = empty ? 0 : a.dw[t] * gates.w[t] + (kept ? 0 : dm);
      if (!kept) dm = 0;
    }
    a.flow[h] = dm;
    this->load_numbers(in.gates.decay, chunk, head, a.numbers);
    for (int64_t i = 0; i < chunk.count; i += kLanes<A>)
      store<A>(a.dg + i, load<A>(a.dg + i) * sigmoid(-load<A>(a.numbers + i)));
    store_ddecay(chunk, head, h, a.dg, a);
    this->store_numbers(a.dw, p.dinput, chunk, head);
  }

  bool constant_decay() const { return p.ddecay.l == 0; }  // (HV,)
  void store_ddecay(const Chunk& chunk, int64_t head, int64_t h, const A* from, const Arrays& a) const {
    if (!constant_decay()) return this->store_numbers(from, p.ddecay, chunk, head);
    for (int64_t t = chunk.count - 1; t >= 0; --t) a.of_head[h * kHeadNumbers + 2] += from[t];
  }
  void clear_gate_gradients(const Chunk& chunk, int64_t head, const Arrays& a) const {
    clear(a.dg, kChunk);
    if (p.ddecay && !constant_decay()) this->store_numbers(a.dg, p.ddecay, chunk, head);
    if (p.dinput) this->store_numbers(a.dg, p.dinput, chunk, head);
  }

  // ---- parameters: sums over the tokens of a unit in the workspace, then over units in order

  void clear_sums(int64_t heads, const Arrays& a) const {
    clear(a.dD, heads * dD_row), clear(a.dbonus, key_row);
    for (int64_t i = 0; i < heads * kHeadNumbers; ++i) a.of_head[i] = 0;
  }
  void store_sums(const Unit& u, int64_t h, const Arrays& a) const {
    A* const to = this->head_partials + (u.segment * in.value_heads + u.head + h) * numbers;
    for (int64_t i = 0; i < kHeadNumbers; ++i) to[i] = a.of_head[h * kHeadNumbers + i];
    const A* const dD = a.dD + h * dD_row;
    if (in.skip && in.skip_v == 0)
      for (int64_t v = to[kHeadNumbers] = 0; v < in.size; ++v) to[kHeadNumbers] += dD[v];
    else if (in.skip)
      copy(dD, in.size, to + kHeadNumbers);
  }
  void store_dbonus(const Unit& u, const Arrays& a) const {
    const int64_t row = (u.segment * in.heads + u.key_head) * parts + u.part;
    if (in.bonus) copy(a.dbonus, in.keys, this->bonus_partials + row * in.keys);
  }

  void reduce_parameters() const {
    for (int64_t head = 0; head < in.value_heads; ++head) {
      const auto reduce = [&](int64_t i) {
        A sum = 0;
        for (int64_t s = 0; s < segments; ++s) sum += this->head_partials[(s * in.value_heads + head) * numbers + i];
        return sum;
      };
      if (p.dA) store_number(p.dA, head, reduce(0));
      if (p.dbias) store_number(p.dbias, head, reduce(1));
      if (p.ddecay && constant_decay()) store_number({p.ddecay.data, p.ddecay.dtype}, head * p.ddecay.h, reduce(2));
      const int64_t skips = p.dskip ? numbers - kHeadNumbers : 0;
      for (int64_t i = 0; i < skips; ++i) store_number(p.dskip, head * skips + i, reduce(kHeadNumbers + i));
    }
    if (!p.dbonus) return;
    for (int64_t i = 0; i < in.heads * in.keys; ++i) {
      A sum = 0;
      for (int64_t s = 0; s < segments; ++s)
        for (int64_t part = 0; part < parts; ++part)
          sum += this->bonus_partials[((s * in.heads + i / in.keys) * parts + part) * in.keys + i % in.keys];
      store_number(p.dbonus, i, sum);
    }
  }
  static void store_number(const Array& to, int64_t i, A value) {
    visit_dtype(to.dtype, [&]<class X>() { static_cast<X*>(to.data)[i] = narrow<X>(value); });
  }
};

}  // namespace
}  // namespace seqkern::linear_attention

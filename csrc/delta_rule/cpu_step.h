// One token. Internal to cpu.cpp.
//
// Columns of a state know nothing of each other. A strip of them is read once, for what it says of e and of q, and
// moved on while it is in the first-level cache.
#pragma once
#include "common/parallel.h"
#include "common/rows.h"
#include "common/simd_math.h"
#include "common/state_row.h"
#include "delta_rule/params.h"

namespace seqkern::delta_rule {
namespace {

template <class A>
struct Step {
  using Rows = StepParams::Rows;
  static constexpr int kVectors = 4;
  static constexpr int64_t kStrip = kVectors * kLanes<A>;  // values
  static constexpr int64_t kGrain = 1 << 15;               // numbers of states worth another thread

  const StepParams& p;
  const int64_t strips = ceil_div(p.size, kStrip), group = p.value_heads / at_least(1, p.heads);
  const bool in_place = p.S_v == 1;

  explicit Step(const StepParams& params) : p(params) {}

  // Of a head: k, and e and q as they read the state before the token, decayed.
  struct Arrays {
    A *k, *e, *q, *decay;  // (K) in whole vectors; decay is exp(g)
    A *v, *o;              // (kStrip)
    A* S;                  // (K, kStrip), where values do not lie side by side
  };
  struct Room : Arrays {
    template <class Take>
    void allocate(const Step& step, const Take& take) {
      const int64_t K = whole(step.p.keys);
      this->k = take(K), this->e = take(K), this->q = take(K), this->decay = take(K);
      this->v = take(kStrip), this->o = take(kStrip), this->S = take(step.in_place ? 0 : step.p.keys * kStrip);
    }
  };
  struct Head {
    int64_t b, head, row;  // of the state, -1: none
    A beta, q_k;           // q . k
  };

  void run() const {
    const int64_t work = at_least(1, p.keys * kStrip);
    parallel_for(0, p.batch * p.value_heads * strips, kGrain / work + 1, [&](int64_t begin, int64_t end) {
      const InScratch<A, Room> x(*this);
      Head head{};
      for (int64_t i = begin; i < end; ++i) {
        if (i == begin || i % strips == 0) head = load_head(i / strips, x);
        const int64_t first = i % strips * kStrip, values = at_most(kStrip, p.size - first);
        if (head.row < 0)
          clear(x.o, kStrip);
        else
          advance(head, first, values, x);
        store_strided(x.o, p.o, head.b * p.o.b + head.head * p.o.h + first * p.o.i, p.o.i, values);
      }
    });
  }

  Head load_head(int64_t index, const Arrays& x) const {
    const int64_t b = index / p.value_heads, head = index % p.value_heads, key_head = head / group, K = whole(p.keys);
    Head of = {b, head, state_row(p, b), 0, 0};
    if (of.row < 0) return of;
    load_strided(p.beta, b * p.beta.b + head * p.beta.h, 1, 1, &of.beta);
    load_keys(p.q, b, key_head, x.q), load_keys(p.k, b, key_head, x.k);
    if (p.normalize) normalize(x.q), normalize(x.k);  // [norm]
    of.q_k = dot(x.q, x.k, K);
    if (p.erase)
      load_keys(p.erase, b, key_head, x.e);
    else
      copy(x.k, K, x.e);
    load_decay(b, head, x.decay);
    multiply_row(x.decay, x.e, K, x.e), multiply_row(x.decay, x.q, K, x.q);
    return of;
  }
  void load_decay(int64_t b, int64_t head, A* decay) const {
    const int64_t K = whole(p.keys);
    clear(decay, K);
    if (p.form == Decay::kToken) {
      A g = 0;
      load_strided(p.decay, b * p.decay.b + head * p.decay.h, 1, 1, &g);
      fill(decay, K, g);
    }
    if (p.form == Decay::kKey) load_keys(p.decay, b, head, decay);
    for (int64_t i = 0; i < K; i += kLanes<A>) store<A>(decay + i, exp_of_negative(load<A>(decay + i)));
  }
  void normalize(A* x) const {
    const A sum = dot(x, x, whole(p.keys)) + static_cast<A>(kNormEps);
    scale_row(A{1} / static_cast<A>(__builtin_sqrt(sum)), x, whole(p.keys), x);
  }

  // Values [first, first + values) of a head; o in x.
  void advance(const Head& of, int64_t first, int64_t values, const Arrays& x) const {
    load_values(p.v, of.b, of.head, first, values, x.v);
    visit_dtype(p.S.dtype, [&]<class T>() {
      T* const S = static_cast<T*>(p.S.data) + of.row * p.S.b + of.head * p.S.h + first * p.S_v;
      if (in_place) return advance_strip(of, S, p.S.i, values, x);
      for (int64_t k = 0; k < p.keys; ++k) convert(S + k * p.S.i, p.S_v, values, x.S + k * kStrip);
      advance_strip(of, x.S, kStrip, values, x);
      for (int64_t k = 0; k < p.keys; ++k) store_all(x.S + k * kStrip, S + k * p.S.i, p.S_v, values);
    });
  }
  template <class T>
  void advance_strip(const Head& of, T* S, int64_t stride, int64_t values, const Arrays& x) const {
    if (values == kStrip)
      advance_columns<true>(of, S, stride, values, x);
    else
      advance_columns<false>(of, S, stride, values, x);
  }

  // S (K, values), rows `stride` apart.
  template <bool kWhole, class T>
  void advance_columns(const Head& of, T* S, int64_t stride, int64_t values, const Arrays& x) const {
    int lanes[kVectors];
    for (int j = 0; j < kVectors; ++j)
      lanes[j] = kWhole ? kLanes<A> : static_cast<int>(at_least(0, at_most(kLanes<A>, values - j * kLanes<A>)));
    // S'^T e and S'^T q
    Vec<A> of_e[kVectors] = {}, of_q[kVectors] = {};
    for (int64_t k = 0; k < p.keys; ++k) {
      const Vec<A> e = splat(x.e[k]), q = splat(x.q[k]);
      for (int j = 0; j < kVectors; ++j) {
        const T* const at = S + k * stride + j * kLanes<A>;
        const Vec<A> before = kWhole ? load<A>(at) : load<A>(at, lanes[j]);
        of_e[j] = madd(e, before, of_e[j]), of_q[j] = madd(q, before, of_q[j]);
      }
    }
    // [erase], and [read]: S_t^T q = S'^T q + (k . q) u
    Vec<A> u[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      u[j] = of.beta * (load<A>(x.v + j * kLanes<A>) - of_e[j]);
      store<A>(x.o + j * kLanes<A>, static_cast<A>(p.scale) * madd(splat(of.q_k), u[j], of_q[j]));
    }
    // [decay] [write], first of the rows that were read last: with rows 512 bytes apart not all of a strip stay in the
    // cache
    for (int64_t k = p.keys - 1; k >= 0; --k) {
      const Vec<A> decay = splat(x.decay[k]), of_k = splat(x.k[k]);
      for (int j = 0; j < kVectors; ++j) {
        T* const at = S + k * stride + j * kLanes<A>;
        if constexpr (kWhole)
          store<A>(at, madd(of_k, u[j], decay * load<A>(at)));
        else
          store<A>(at, madd(of_k, u[j], decay * load<A>(at, lanes[j])), lanes[j]);
      }
    }
  }

  // ---- memory

  static constexpr int64_t whole(int64_t count) { return round_up(count, kLanes<A>); }
  void load_keys(const Rows& x, int64_t b, int64_t head, A* to) const {
    clear(to, whole(p.keys));
    load_strided(x, b * x.b + head * x.h, x.i, p.keys, to);
  }
  void load_values(const Rows& x, int64_t b, int64_t head, int64_t first, int64_t values, A* to) const {
    clear(to, kStrip);
    load_strided(x, b * x.b + head * x.h + first * x.i, x.i, values, to);
  }
};

}  // namespace
}  // namespace seqkern::delta_rule

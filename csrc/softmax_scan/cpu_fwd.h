// The forward pass. Internal to cpu.cpp.
#pragma once
#include "softmax_scan/cpu_call.h"

namespace seqkern::softmax_scan {
namespace {

template <class T>
struct Forward : Call<T> {
  using A = Accumulator<T>;
  using Call<T>::in, Call<T>::step;

  const FwdParams& p;
  const int64_t parts = at_least(1, (in.size + kPart - 1) / kPart);  // of a head
  const int64_t v_ahead = this->ahead(in.v);
  static constexpr int64_t kMaxHeads = 64;

  explicit Forward(const FwdParams& params) : Call<T>(params), p(params) {}

  struct Arrays : Weights<A> {
    A* w;  // (heads, values in whole vectors)

    template <class Take>
    void allocate(const Forward& call, const Take& take) {
      const int64_t heads = heads_of_block(call.in, kMaxHeads);
      Weights<A>::allocate(kChunk, heads, take);
      w = take(heads * whole_vectors<A>(call.in.size));
    }
  };

  void run() const {
    const int64_t tokens = in.sequences.batch * in.sequences.length / at_least(1, in.num_runs);
    const int64_t work = at_least(1, tokens * at_most(in.size, kPart));
    parallel_for(0, in.num_runs * in.heads * parts, kGrain / work + 1, [&](int64_t begin, int64_t end) {
      const InScratch<A, Arrays> arrays(*this);
      for_each_block(in, parts, kMaxHeads, begin, end, [&](const Block& block) { scan(block, arrays); });
      finish_streams();
    });
  }

  void scan(const Block& block, const Arrays& a) const {
    const int64_t tokens = this->num_tokens(block);
    if (block.run->padding) return clear_outputs(block);
    this->load_initial_state(block, a.m, a.n, a.w);
    for (int64_t k = 0; k < tokens; k += kChunk) {
      const int64_t count = at_most(kChunk, tokens - k);
      this->load_scores(block, k, count, a.s);
      a.advance(count, block.heads);
      scan_values(block, k, count, a);
      if (p.normalizers && block.value == 0) store_normalizers(block, k, count, a);
      a.pass_on(count, block.heads);
    }
    if (p.final_state && block.run->final >= 0) store_final_state(block, a);
  }

  void scan_values(const Block& block, int64_t k, int64_t count, const Arrays& a) const {
    const int64_t row = row_of<A>(block.heads), width = whole_vectors<A>(block.values);
    for (int64_t t = 0; t < count; ++t) {
      const T* const v = this->values(in.v, block, k + t);
      T* const o = this->values(p.o, block, k + t);
      for (int64_t h = 0; h < block.heads; ++h) {
        const int64_t i = t * row + h;
        scan_token(v + h * in.v.h, o + h * p.o.h, a.w + h * width, block.values, a, i);
      }
    }
  }

  // The values of a token and head, whose numbers are the i-th.
  void scan_token(const T* v, T* o, A* w, int64_t values, const Arrays& a, int64_t i) const {
    const Vec<A> weight = splat(a.weight[i]), decay = splat(a.decay[i]), inverse = splat(a.inverse[i]);
    const bool absent = a.s[i] == kEmpty<A>;  // whatever v is
    for_each_vector<A>(values, [&](int64_t j, int lanes) {
      prefetch_read(v + j + v_ahead, 0);
      const Vec<A> entering = absent ? Vec<A>{} : weight * load<A>(v + j, lanes);
      const Vec<A> sum = madd(decay, load<A>(w + j), entering);  // [sumv]
      store<A>(w + j, sum);
      this->put(o + j, sum * inverse, lanes);  // [out]
    });
  }

  void store_normalizers(const Block& block, int64_t k, int64_t count, const Arrays& a) const {
    const int64_t row = row_of<A>(block.heads);
    for (int64_t t = 0; t < count; ++t) {
      A* const to = static_cast<A*>(p.normalizers) + 2 * this->number(block, k + t);
      for (int64_t h = 0; h < block.heads; ++h) {
        const int64_t i = (t + 1) * row + h;
        to[2 * h] = a.m[i], to[2 * h + 1] = a.n[i];
      }
    }
  }

  void store_final_state(const Block& block, const Arrays& a) const {
    const State& state = p.final_state;
    const int64_t head = this->head_of_state(block, block.run->final), width = whole_vectors<A>(block.values);
    if (block.value == 0) store_array(a.m, block.heads, state.m, head), store_array(a.n, block.heads, state.n, head);
    for (int64_t h = 0; h < block.heads; ++h)
      store_array(a.w + h * width, block.values, state.w, (head + h) * in.size + block.value);
  }

  void clear_outputs(const Block& block) const {
    for (int64_t k = 0; k < this->num_tokens(block); ++k) {
      T* const o = this->values(p.o, block, k);
      for (int64_t h = 0; h < block.heads; ++h)
        __builtin_memset(o + h * p.o.h, 0, static_cast<size_t>(block.values) * sizeof(T));
      A* const normalizers = static_cast<A*>(p.normalizers);
      if (normalizers && block.value == 0)
        __builtin_memset(normalizers + 2 * this->number(block, k), 0, static_cast<size_t>(2 * block.heads) * sizeof(A));
    }
  }
};

}  // namespace
}  // namespace seqkern::softmax_scan

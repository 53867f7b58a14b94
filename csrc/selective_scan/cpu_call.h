// What forward and backward share: where the tokens of a call lie, its parameters per vector of channels, and its
// states. Internal to cpu.cpp.
#pragma once
#include "selective_scan/cpu_plan.h"
#include "selective_scan/cpu_scan.h"
#include "selective_scan/cpu_tile.h"

namespace seqkern::selective_scan {
namespace {

// Threads are worth waking for this many steps of states.
constexpr int64_t kGrain = 1 << 16;

// kLanes neighbouring channels, of which `lanes` are of the call, all in one group of B and one of C. Numbers of all
// states, one after another, and vectors.
template <class F>
struct Channels {
  using A = typename F::A;

  int64_t first;
  int lanes;
  A* scaled_A;  // N numbers; their (real parts) times log2(e)
  A* plain_A;   // N numbers
  A *B, *C;     // N numbers, of constant ones
  A *D, *bias;
  A* h;  // N numbers: a state

  // `take(count)` gives an array of that many accumulators.
  template <class Take>
  void allocate(const Inputs& in, const Take& take) {
    const int64_t numbers = in.states * F::kWidth;
    scaled_A = take(numbers), plain_A = take(numbers), h = take(numbers);
    B = in.B.constant() ? take(numbers) : nullptr;
    C = in.C.constant() ? take(numbers) : nullptr;
    D = take(kLanes<A>), bias = take(kLanes<A>);
  }

  void load(const Inputs& in, int64_t first_channel, int64_t end) {
    first = first_channel, lanes = static_cast<int>(at_most(kLanes<A>, end - first_channel));
    load_states(in, in.A, 0, plain_A);
    for (int64_t n = 0; n < in.states; ++n)
      F::store(scaled_A + n * F::kWidth, scaled(F::load(plain_A + n * F::kWidth)));
    if (B) load_states(in, {in.B.data, in.B.dtype}, 0, B);
    if (C) load_states(in, {in.C.data, in.C.dtype}, 0, C);
    load_vector(in.D, D);
    load_vector(in.delta_bias, bias);
  }

  // Of (rows, D, N): all states of these channels in a row. Absent: zeros.
  Plane states(const Inputs& in, const Array& array, int64_t row) const {
    const int64_t count = in.states * F::kParts;
    return plane(array.data, array.dtype, (row * in.channels + first) * count, count, 1);
  }
  void load_states(const Inputs& in, const Array& array, int64_t row, A* to) const {
    if (array && row >= 0)
      load_tile<A>(states(in, array, row), lanes, in.states * F::kParts, to);
    else
      clear(to, in.states * F::kWidth);
  }
  void load_vector(const Array& array, A* to) const {
    if (array)
      load_tile<A>(plane(array.data, array.dtype, first, 1, 0), lanes, 1, to);
    else
      clear(to, kLanes<A>);
  }

  static void clear(A* p, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes<A>) seqkern::store<A>(p + i, Vec<A>{});
  }
};

// Tokens [tau, tau + count) of a run in processing time, in one chunk. `begins`: with the first token of the run.
struct Chunk {
  const Run* run;
  int64_t tau, count;
  bool begins;
};

template <class F>
struct Call {
  using A = typename F::A;

  const Inputs& in;
  const bool reverse = in.sequences.reverse;
  const int64_t L = in.sequences.length;
  const int64_t row = round_up(in.states, kLanes<A>);  // of a token (complex: a part) in a tile of B or C
  const int64_t coefficients = kChunk * F::kParts * row;

  explicit Call(const Inputs& inputs) : in(inputs) {}

  // Calls body(chunk) for the chunks of a run in processing order, or backwards.
  template <class Body>
  void for_each_chunk(const Run& run, bool backwards, const Body& body) const {
    const int64_t begin = reverse ? L - run.end : run.begin, end = begin + run.end - run.begin;
    if (begin == end) return;
    const int64_t first = begin / kChunk, last = (end - 1) / kChunk;
    for (int64_t i = 0; i <= last - first; ++i) {
      const int64_t chunk = backwards ? last - i : first + i;
      const int64_t tau = at_least(begin, chunk * kChunk);
      body(Chunk{&run, tau, at_most(end, (chunk + 1) * kChunk) - tau, tau == begin});
    }
  }

  int64_t token(int64_t tau) const { return reverse ? L - 1 - tau : tau; }

  // From token tau of channel d on.
  Plane tokens(const Data& x, const Chunk& chunk, int64_t d) const {
    const int64_t offset = chunk.run->b * x.stride.b + d * x.stride.d + token(chunk.tau) * x.stride.l;
    return plane(x.data, x.dtype, offset, x.stride.d, reverse ? -x.stride.l : x.stride.l);
  }

  // B or C: constant, or variable in a tile.
  Coefficients<F> coefficients_of(const Projection& p, const A* constant, const A* tile) const {
    if (p.constant()) return {constant, true, 0, 0};
    const bool swapped = reverse && F::kParts == 2;  // backwards the imaginary part comes first
    return {tile + (swapped ? row : 0), false, F::kParts * row, swapped ? -row : row};
  }
  void load_coefficients(const Projection& p, const Chunk& chunk, int64_t d, A* tile) const {
    if (p.constant()) return;
    const int64_t g = d / (in.channels / p.groups);
    const int64_t first = token(chunk.tau) * F::kParts + (reverse ? F::kParts - 1 : 0);
    for (int64_t n = 0; n < in.states; n += kLanes<A>)
      load_tile<A>(
          plane(p.data, p.dtype, chunk.run->b * p.b + g * p.g + n * p.n + first * p.im, p.n, reverse ? -p.im : p.im),
          static_cast<int>(at_most(kLanes<A>, in.states - n)), chunk.count * F::kParts, tile + n, row);
  }

  // [delta] delta' and x = delta' u of a tile; also d delta' / d delta, if `slope` is given.
  void load_delta(const Chunk& chunk, const Channels<F>& channels, A* u, A* delta, A* x, A* slope) const {
    load_tile<A>(tokens(in.u, chunk, channels.first), channels.lanes, chunk.count, u);
    load_tile<A>(tokens(in.delta, chunk, channels.first), channels.lanes, chunk.count, delta);
    const Vec<A> bias = load<A>(channels.bias), one = Vec<A>{} + 1;
    for (int64_t i = 0; i < chunk.count * kLanes<A>; i += kLanes<A>) {
      const Vec<A> sum = load<A>(delta + i) + bias;
      const Vec<A> value = in.softplus ? softplus(sum) : sum;
      store<A>(delta + i, value);
      store<A>(x + i, value * load<A>(u + i));
      if (slope) store<A>(slope + i, !in.softplus ? one : sum > A{20} ? one : sigmoid(sum));
    }
  }

  // [out] without the gate: 1 or 2 Re sum_n C h, + D u
  Vec<A> output(const Channels<F>& channels, Vec<A> sum, Vec<A> u) const {
    if constexpr (F::kParts == 2) sum += sum;
    return in.D ? madd(load<A>(channels.D), u, sum) : sum;
  }

  void store_tokens(const A* tile, const Data& x, const Chunk& chunk, const Channels<F>& channels) const {
    const int64_t bytes = in.sequences.batch * in.channels * L * size_of(x.dtype);
    store_tile<A>(tile, tokens(x, chunk, channels.first), channels.lanes, chunk.count, kLanes<A>, bytes >= kLargeBytes);
  }
  void store_zeros(const Data& x, const Chunk& chunk, const Channels<F>& channels) const {
    const A zeros[kChunk * kLanes<A>] = {};
    store_tokens(zeros, x, chunk, channels);
  }

  static constexpr int64_t kLargeBytes = 4 << 20;  // beyond a second-level cache
};

}  // namespace
}  // namespace seqkern::selective_scan

// What forward and backward share on the device: where a lane's head and value lie, and exponentials.
#pragma once

#include "common/time_scan.cuh"
#include "softmax_scan/tile.h"

namespace seqkern {
namespace softmax_scan::cuda {

template <typename R>
inline constexpr R kInfinity = static_cast<R>(__builtin_huge_val());

// exp(x), x <= 0. In fp32 what is below 2^-126 becomes 0.
__device__ __forceinline__ float exp_of(float x) {
  return exp2_approx(x * 1.44269504f);
}
__device__ __forceinline__ double exp_of(double x) {
  return exp(x);
}

// x / y, in fp32 to 2 units in the last place.
__device__ __forceinline__ float over(float x, float y) {
  return __fdividef(x, y);
}
__device__ __forceinline__ double over(double x, double y) {
  return x / y;
}

// The normalizers of a token, as they lie in memory.
template <typename R>
struct Normalizers {
  R m, n;
};

}  // namespace softmax_scan::cuda

template <typename R>
struct RealOf<softmax_scan::cuda::Normalizers<R>> {
  using Type = R;
};

namespace softmax_scan::cuda {

// A lane's channel of the scan: value i of head h, of those that exist.
struct Channel {
  int64_t b, h, i;
  bool head, value;  // exists; a head has at least one lane, even where V = 0

  __device__ __forceinline__ Channel(const Inputs& in, int lanes, int64_t b_, int64_t channel, bool exists)
      : b(b_), head(exists) {
    const auto [of_head, lane] = divide(channel, lanes);
    h = of_head, i = lane, value = head && i < in.size;
  }
  __device__ __forceinline__ bool leads() const { return head && i == 0; }

  // Its tokens: one score for all lanes of a head.
  __device__ __forceinline__ time_scan::Line scores(const Data& s, const Sequences& sequences) const {
    return {{s.data, s.dtype}, b * s.b + h * s.h, s.l, sequences, head};
  }
  __device__ __forceinline__ time_scan::Line values(const Data& v, const Sequences& sequences) const {
    return {{v.data, v.dtype}, b * v.b + h * v.h + i, v.l, sequences, value};
  }
  __device__ __forceinline__ time_scan::Line normalizers(const void* data, const Inputs& in, const Sequences& sequences,
                                                         bool exists) const {
    return {
        {const_cast<void*>(data), in.accumulator}, b * sequences.length * in.heads + h, in.heads, sequences, exists};
  }

  // Elements of a state.
  __device__ __forceinline__ int64_t head_of(const Inputs& in, int64_t row) const { return row * in.heads + h; }
  __device__ __forceinline__ int64_t value_of(const Inputs& in, int64_t row) const {
    return head_of(in, row) * in.size + i;
  }
};

// The state [max] [sum] [sumv] of one value of a head; also what several tokens add to one: the scan's monoid.
template <typename R>
struct Sums {
  R m, n, w;

  __device__ __forceinline__ static Sums empty() { return {-kInfinity<R>, R(0), R(0)}; }

  // Row `row` of a state, in any dtype, as channel `c` has it; -1: empty.
  __device__ __forceinline__ static Sums load_row(const State& state, const Inputs& in, const Channel& c, int64_t row) {
    Sums sums = empty();
    if (row < 0 || !c.head) return sums;
    const R m = load<R>(state.m, c.head_of(in, row));
    if (m == -kInfinity<R>) return sums;
    sums.m = m, sums.n = load<R>(state.n, c.head_of(in, row)) + (m - m);  // NaN where m is infinite
    if (c.value) sums.w = load<R>(state.w, c.value_of(in, row));
    return sums;
  }
  __device__ __forceinline__ void store_row(const State& state, const Inputs& in, const Channel& c, int64_t row) const {
    if (c.leads()) store(state.m, c.head_of(in, row), m), store(state.n, c.head_of(in, row), n);
    if (c.value) store(state.w, c.value_of(in, row), w);
  }
};

// Both together, relative to the larger m: one exponential. Where nothing is added nothing changes. NaN rises, and
// stays.
template <typename R>
__device__ __forceinline__ Sums<R> merge(const Sums<R>& later, const Sums<R>& earlier) {
  const bool rises = !(later.m <= earlier.m) && earlier.m == earlier.m;
  const R e = later.m == -kInfinity<R> ? R(0) : exp_of(-fabs(later.m - earlier.m));
  const R keep = rises ? e : R(1), add = rises ? R(1) : e;
  return {rises ? later.m : earlier.m, fma(keep, earlier.n, add * later.n), fma(keep, earlier.w, add * later.w)};
}

// One token is the sums over it alone; what has no weight is left out, whatever its value. The weight of inf is NaN,
// as inf - inf is.
template <typename R>
__device__ __forceinline__ Sums<R> token_of(R s, R v) {
  const bool counts = s != -kInfinity<R>;
  const R one = R(1) + (s - s);
  return {s, counts ? one : R(0), counts ? one * v : R(0)};
}

// Launches that forward and backward share.
void clear_flags(const time_scan::Cut& cut, void* workspace, Stream stream);

}  // namespace softmax_scan::cuda
}  // namespace seqkern

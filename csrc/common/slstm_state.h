// sLSTM's numbers beside h, as the state of a step shows them and as cells of vectors carry them, for CPU kernels.
//   shown    c, n, m: in a scale exp(m), whichever; n = 0 in the empty state
//   carried  y = c / n, and l = m + log n, the logarithm of the whole n: -inf in the empty state
#pragma once
#include "common/simd_math.h"

namespace seqkern {
namespace {

template <class A>
struct SlstmState {
  using V = Vec<A>;

  static void carry(V c, V n, V m, V& y, V& l) {
    l = select(n == 0, empty(), m + log_of_lanes(n));
    y = select(l == empty(), V{}, c / n);
  }
  // In the scale in which n is 1.
  static void show(V y, V l, V& c, V& n, V& m) { c = y, n = select(l == empty(), V{}, V{} + 1), m = l; }

 private:
  static V empty() { return V{} - __builtin_inff(); }
  static V log_of_lanes(V n) {
    bool any = false;
    for (int i = 0; i < kLanes<A>; ++i) any |= n[i] != 1;
    if (!any) return V{};  // as show() leaves it
    for (int i = 0; i < kLanes<A>; ++i) n[i] = static_cast<A>(__builtin_log(static_cast<double>(n[i])));
    return n;
  }
};

}  // namespace
}  // namespace seqkern

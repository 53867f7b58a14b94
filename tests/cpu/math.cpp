// common/simd_math.h against libm: a program that fails with the first value that is not as close as it claims.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "common/simd_math.h"

namespace seqkern {
namespace {

[[noreturn]] void fail(const char* name, float x, double y, double expected) {
  std::printf("%s(%.9g): %.9g, expected %.9g\n", name, static_cast<double>(x), y, expected);
  std::exit(1);
}

// For magnitudes from 1e-30 to `largest` of the signs for which it is defined.
template <class F, class Expected>
void test(const char* name, F f, Expected expected, float largest, bool negative, bool positive, double relative,
          double absolute) {
  for (float magnitude = 1e-30f; magnitude < largest; magnitude *= 1.0003f)
    for (const float x : {-magnitude, magnitude}) {
      if (x < 0 ? !negative : !positive) continue;
      const double is = f(splat(x))[0], should = expected(static_cast<double>(x)), error = std::abs(is - should);
      if (!(error <= relative * std::abs(should) && error <= absolute)) fail(name, x, is, should);
    }
}

void test_tanh_at_its_ends() {
  const float inf = __builtin_inff();
  const Float ends = {-inf, inf, __builtin_nanf(""), -0.f}, y = tanh(ends);
  for (int i = 0; i < 4; ++i) {
    const float expected = std::tanh(ends[i]);
    if (i == 2 ? y[i] == y[i] : y[i] != expected || std::signbit(y[i]) != std::signbit(expected))
      fail("tanh", ends[i], static_cast<double>(y[i]), static_cast<double>(expected));
  }
}

}  // namespace
}  // namespace seqkern

int main() {
  using namespace seqkern;
  const double any = __builtin_inf();
  test("tanh", [](Float x) { return tanh(x); }, [](double x) { return std::tanh(x); }, 30, true, true, 1e-6, 2e-7);
  test("exp2", [](Float x) { return exp2(x); }, [](double x) { return std::exp2(x); }, 120, true, true, 3e-7, any);
  test(
      "exp_of_negative", [](Float x) { return exp_of_negative(x); }, [](double x) { return std::exp(x); }, 80, true,
      false, 3e-7, any);
  test(
      "softplus", [](Float x) { return softplus(x); }, [](double x) { return std::log1p(std::exp(x)); }, 80, true, true,
      4e-7, any);
  test_tanh_at_its_ends();
  return 0;
}

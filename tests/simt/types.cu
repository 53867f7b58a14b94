// The 16-bit floats and arithmetic intrinsics that the emulator defines for itself.
#include <cmath>

#include "case.h"

using namespace seqkern;

namespace {

// The value of a non-negative, finite 16-bit float by its definition.
double value_of(int bits, int mantissa_bits, int bias) {
  const int exponent = bits >> mantissa_bits, fraction = bits & ((1 << mantissa_bits) - 1);
  if (exponent == 0) return std::ldexp(fraction, 1 - bias - mantissa_bits);
  return std::ldexp(fraction + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

// Every number, and between every two neighbours the middle (which goes to the even one) and the floats beside it.
template <typename T>
void check_type(int mantissa_bits, int bias, int infinity) {
  const auto bits_of = [](float x) { return static_cast<int>(T(x).bits); };
  for (int bits = 0; bits < infinity; ++bits) {
    const double value = value_of(bits, mantissa_bits, bias), above = value_of(bits + 1, mantissa_bits, bias);
    T number;
    number.bits = static_cast<uint16_t>(bits);
    expect("a number is what its bits say", static_cast<double>(static_cast<float>(number)) == value);
    expect("a number stays what it is", bits_of(static_cast<float>(value)) == bits);
    expect("the sign", bits_of(static_cast<float>(-value)) == (bits | 0x8000));
    const float middle = static_cast<float>((value + above) / 2);
    expect("a middle goes to the even number", bits_of(middle) == bits + bits % 2);
    if (static_cast<double>(middle) != (value + above) / 2) continue;  // below the smallest float
    expect("just below a middle", bits_of(std::nextafter(middle, 0.0f)) == bits);
    expect("just above a middle", bits_of(std::nextafter(middle, INFINITY)) == bits + 1);
  }
  expect("infinity", bits_of(INFINITY) == infinity && bits_of(-INFINITY) == (infinity | 0x8000));
  expect("too large", bits_of(3.4028235e38f) == infinity);
  expect("NaN", std::isnan(static_cast<float>(T(NAN))) && std::isnan(static_cast<float>(T(-NAN))));
}

const Case half("half", [] { check_type<__half>(10, 15, 0x7c00); });
const Case bfloat16("bfloat16", [] { check_type<__nv_bfloat16>(7, 127, 0x7f80); });

__global__ void compute(float* y) {
  y[0] = __expf(0.0f) + __logf(1.0f) + exp2f(3.0f) + __log2f(8.0f);
  y[1] = rsqrtf(16.0f) + __frcp_rn(4.0f) + __fdividef(3.0f, 2.0f);
  y[2] = __saturatef(2.0f) + __saturatef(-1.0f) + __saturatef(0.5f);
  y[3] = static_cast<float>(__popc(0xf0u) + __ffs(8) + __clz(1));
  y[4] = __uint_as_float(__float_as_uint(2.5f)) + __int_as_float(__float_as_int(-1.5f));
}

const Case intrinsics("intrinsics", [] {
  Array<float> y(5);
  launch({.name = "compute", .grid = {}, .threads = 1}, compute, y.data);
  const float want[] = {12.0f, 2.0f, 1.5f, 39.0f, 1.0f};
  expect("y", y, [&](int i) { return want[i]; });
});

}  // namespace

// Arithmetic of sizes. With internal linkage, because CPU kernels are compiled once per instruction set, which must
// share no code.
#pragma once
#include <cstdint>

namespace seqkern {
namespace {

constexpr int64_t at_most(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t at_least(int64_t a, int64_t b) {
  return a > b ? a : b;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

}  // namespace
}  // namespace seqkern

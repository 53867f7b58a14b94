#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace seqkern {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512"};

Isa choose() {
  const char* wanted = std::getenv("SEQKERN_ISA");
  if (wanted == nullptr || *wanted == '\0') return best_isa();
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i)
    if (std::string(wanted) == kNames[i]) return static_cast<Isa>(i);
  throw std::runtime_error(std::string("seqkern: SEQKERN_ISA must be one of generic, avx2, avx512 and supported by ") +
                           "this processor (best: " + kNames[static_cast<int>(best_isa())] + "), got '" + wanted + "'");
}

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::generic;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa isa) {
  return kNames[static_cast<int>(isa)];
}

}  // namespace seqkern

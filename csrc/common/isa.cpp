#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace seqkern {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "amx"};

Isa choose() {
  const char* wanted = std::getenv("SEQKERN_ISA");
  if (wanted == nullptr || *wanted == '\0') return best_isa();
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i)
    if (std::string(wanted) == kNames[i]) return static_cast<Isa>(i);
  throw std::runtime_error(std::string("seqkern: SEQKERN_ISA must be one of generic, avx2, avx512, amx and ") +
                           "supported by this processor (best: " + kNames[static_cast<int>(best_isa())] + "), got '" +
                           wanted + "'");
}

#if defined(__x86_64__)
// Whether the system lets this process use the registers of tiles. It has to be asked once.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_tiles() {  // and what brings matrices into them
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         __builtin_cpu_supports("avx512bf16") && may_use_tiles();
}

Isa detect() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return has_tiles() ? Isa::amx : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
  return Isa::generic;
}
#else
Isa detect() {
  return Isa::generic;
}
#endif

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

bool amx() noexcept {
  return isa() == Isa::amx;
}

const char* isa_name(Isa isa) {
  return kNames[static_cast<int>(isa)];
}

}  // namespace seqkern

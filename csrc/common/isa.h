// Which instruction set the CPU kernels use: the best one this machine has, or the one named by SEQKERN_ISA.
#pragma once

namespace seqkern {

enum class Isa { generic, avx2, avx512, amx };  // amx: avx512, and BFloat16 matrices multiplied by tiles

Isa isa();                  // throws if SEQKERN_ISA names an unknown or unsupported one
Isa best_isa();             // of this machine; those before it work here too
const char* isa_name(Isa);  // as enumerators are spelled

bool amx() noexcept;  // whether tiles may be used

template <class Kernels>
const Kernels& select(const Kernels& generic, const Kernels& avx2, const Kernels& avx512) {
  switch (isa()) {
    case Isa::amx:
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return generic;
  }
}

}  // namespace seqkern

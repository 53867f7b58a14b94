// Which instruction set the CPU kernels use: the best one this machine has, or the one named by SEQKERN_ISA.
#pragma once

namespace seqkern {

enum class Isa { generic, avx2, avx512 };

Isa isa();                  // throws if SEQKERN_ISA names an unknown or unsupported one
Isa best_isa();             // of this machine; those before it work here too
const char* isa_name(Isa);  // "generic", "avx2", "avx512"

template <class Kernels>
const Kernels& select(const Kernels& generic, const Kernels& avx2, const Kernels& avx512) {
  switch (isa()) {
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return generic;
  }
}

}  // namespace seqkern

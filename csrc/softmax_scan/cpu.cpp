// softmax_scan on the CPU, compiled once per instruction set. Torch-free.
//
// A thread walks through time with a block of heads. For a chunk of tokens it first computes what concerns no values:
// m, n and the exponentials, as vectors over tokens and heads. Then it goes through the values of each token, whose
// sums stay in the first-level cache.
#include "softmax_scan/cpu_bwd.h"
#include "softmax_scan/cpu_fwd.h"
#include "softmax_scan/cpu_step.h"

namespace seqkern::softmax_scan::SEQKERN_ISA {
namespace {

void fwd(const FwdParams& p) {
  visit_dtype(p.v.dtype, [&]<class T>() { Forward<T>(p).run(); });
}
void bwd(const BwdParams& p) {
  visit_dtype(p.v.dtype, [&]<class T>() { Backward<T>(p).run(); });
}
void step(const StepParams& p) {
  if (p.accumulator == DType::kFloat64)
    Step<double>{p}.run();
  else
    Step<float>{p}.run();
}

}  // namespace

const CpuKernels kernels = {fwd, bwd, step};

}  // namespace seqkern::softmax_scan::SEQKERN_ISA

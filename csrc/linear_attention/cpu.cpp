// linear_attention on the CPU, compiled once per instruction set. Torch-free.
//
// A thread walks through the chunks of a run with the states of some value heads in its caches. Products of matrices
// (common/gemm.h) do most of the work of a chunk; decays are exponentials of sums that never subtract.
#include "linear_attention/cpu_bwd.h"
#include "linear_attention/cpu_fwd.h"
#include "linear_attention/cpu_step.h"

namespace seqkern::linear_attention::SEQKERN_ISA {
namespace {

// Calls body.template operator()<T>() with the type of the operands of products.
template <class Body>
void visit_call(const Inputs& in, const Body& body) {
  visit_dtype(in.v.dtype, [&]<class X>() { visit_operands<X>(body); });
}

void fwd(const FwdParams& p) {
  visit_call(p, [&]<class T>() { Forward<T>(p).run(); });
}
void bwd(const BwdParams& p) {
  visit_call(p, [&]<class T>() { Backward<T>(p).run(); });
}
void step(const StepParams& p) {
  if (p.accumulator == DType::kFloat64)
    Step<double>(p).run();
  else
    Step<float>(p).run();
}

}  // namespace

const CpuKernels kernels = {fwd, bwd, step};

}  // namespace seqkern::linear_attention::SEQKERN_ISA

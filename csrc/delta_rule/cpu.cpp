// delta_rule on the CPU, compiled once per instruction set. Torch-free.
#include "delta_rule/cpu_bwd.h"
#include "delta_rule/cpu_fwd.h"
#include "delta_rule/cpu_step.h"

namespace seqkern::delta_rule::SEQKERN_ISA {
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

}  // namespace seqkern::delta_rule::SEQKERN_ISA

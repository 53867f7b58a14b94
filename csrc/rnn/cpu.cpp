// rnn on the CPU, compiled once per instruction set. Torch-free.
#include "rnn/cpu_fwd.h"
#include "rnn/cpu_step.h"
#include "rnn/cpu_sum.h"

namespace seqkern::rnn::SEQKERN_ISA {
namespace {

void fwd(const FwdParams& p) {
  visit_call(p, [&]<class C, class X, class T>() { Forward<C, X, T>(p).run(); });
}
void step(const StepParams& p) {
  const auto run = [&]<class A>() { visit_cell<A>(p.cell, [&]<class C>() { Step<C, A>{p}.run(); }); };
  p.accumulator == DType::kFloat64 ? run.template operator()<double>() : run.template operator()<float>();
}

}  // namespace

const CpuKernels kernels = {fwd, nullptr, step, sum_tokens};

}  // namespace seqkern::rnn::SEQKERN_ISA

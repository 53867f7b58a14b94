// rnn on the CPU, compiled once per instruction set. Torch-free.
#include "rnn/cpu_bwd.h"
#include "rnn/cpu_fwd.h"
#include "rnn/cpu_step.h"
#include "rnn/cpu_sum.h"

namespace seqkern::rnn::SEQKERN_ISA {
namespace {

void fwd(const FwdParams& p) {
  visit_call(p, [&]<class C, class X, class T>() { Forward<C, X, T>(p).run(); });
}

void bwd(const BwdParams& p) {
  visit_call(p, [&]<class C, class X, class T>() { Backward<C, X, T>(p).run(); });
}

}  // namespace

const CpuKernels kernels = {fwd, bwd, step_tokens, sum_tokens};

}  // namespace seqkern::rnn::SEQKERN_ISA

// elementwise_rnn on the CPU, compiled once per instruction set. Torch-free.
#include "elementwise_rnn/cpu_bwd.h"
#include "elementwise_rnn/cpu_newton.h"
#include "elementwise_rnn/cpu_shooting.h"
#include "elementwise_rnn/cpu_step.h"

namespace seqkern::elementwise_rnn::SEQKERN_ISA {
namespace {

void fwd(const FwdParams& p) {
  visit_cell(p.cell, p.accumulator, [&]<class C, class A>() {
    switch (solver_of(p)) {
      case Solver::kShooting:
        return Shooting<C, A>(p).run();
      case Solver::kNewton:
        return Newton<C, A>(p).run();
      default:
        return Forward<C, A>(p, channels_of_block<A>(p)).run();
    }
  });
}

void bwd(const BwdParams& p) {
  visit_cell(p.cell, p.accumulator, [&]<class C, class A>() { Backward<C, A>(p).run(); });
}

void step(const StepParams& p) {
  visit_cell(p.cell, p.accumulator, [&]<class C, class A>() { Step<C, A>{p}.run(); });
}

}  // namespace

const CpuKernels kernels = {fwd, bwd, step};

}  // namespace seqkern::elementwise_rnn::SEQKERN_ISA

// linear_scan on the CPU, compiled once per instruction set. Torch-free.
//
// Rows of channels are walked through token by token, so that memory is read and written in long stretches; the state
// of a block of channels stays in the first-level cache. Where runs and channels are too few for that to keep threads
// busy, time is cut into segments.
#include "linear_scan/cpu_scan.h"
#include "linear_scan/cpu_step.h"

namespace seqkern::linear_scan::SEQKERN_ISA {
namespace {

void fwd(const FwdParams& p) {
  visit_form(p.accumulator, p.complex,
             [&]<class F>() { Scan<F, false>(p, p.b, p.h, p.initial_state, p.final_state, p.workspace).run(); });
}

void bwd(const BwdParams& p) {
  visit_form(p.accumulator, p.complex, [&]<class F>() {
    typename F::A* const partials = static_cast<typename F::A*>(p.workspace) + elements_of_maps(p);
    const DecayGradient<F> gradient(p, partials);
    Scan<F, true>(p, p.dh, p.db, p.dfinal_state, p.dinitial_state, p.workspace, p.da ? &gradient : nullptr).run();
    if (p.da) gradient.reduce();
  });
}

void step(const StepParams& p) {
  visit_form(p.accumulator, p.complex, [&]<class F>() { Step<F>{p}.run(); });
}

}  // namespace

const CpuKernels kernels = {fwd, bwd, step};

}  // namespace seqkern::linear_scan::SEQKERN_ISA

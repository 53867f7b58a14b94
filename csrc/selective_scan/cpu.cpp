// selective_scan on the CPU, compiled once per instruction set. Torch-free.
//
// A vector's lanes are neighbouring channels; time is walked through token by token, in chunks of kChunk. What a chunk
// reads of one vector of channels becomes tiles of accumulators, whatever its data types and memory orders, and its
// outputs leave through tiles: the recurrence itself sees neither. States are worked on in blocks that stay in
// registers over a chunk.
#include "selective_scan/cpu_bwd.h"
#include "selective_scan/cpu_fwd.h"
#include "selective_scan/cpu_step.h"

namespace seqkern::selective_scan::SEQKERN_ISA {
namespace {

bool is_plain(const Inputs& in) {
  return !in.two_exp && !in.B.constant() && !in.C.constant();
}

void fwd(const FwdParams& p) {
  visit_form(p.accumulator, p.complex, is_plain(p), [&]<class F>() { Forward<F>(p).run(); });
}
void bwd(const BwdParams& p) {
  visit_form(p.accumulator, p.complex, is_plain(p), [&]<class F>() { Backward<F>(p).run(); });
}
void step(const StepParams& p) {
  visit_form(p.accumulator, p.complex, !p.two_exp, [&]<class F>() { Step<F>{p}.run(); });
}

}  // namespace

const CpuKernels kernels = {fwd, bwd, step};

}  // namespace seqkern::selective_scan::SEQKERN_ISA

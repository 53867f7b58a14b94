// causal_conv1d on the CPU, compiled once per instruction set. Torch-free.
//
// A vector's lanes are consecutive tokens of one channel where time is contiguous in memory, else consecutive channels
// of one token. Either way the work is cut into pieces (tokens of one run x channels); what a piece reads lies in
// windows, in memory or in scratch, where a step in time and a step in lanes are fixed distances, so one loop serves
// both orders, both directions and every data type. The commonest forward passes have loops of their own
// (cpu_direct.h). Every output is the same sum in the same order wherever pieces end and whichever loop computes it.
#include "causal_conv1d/cpu_bwd.h"
#include "causal_conv1d/cpu_fwd.h"
#include "causal_conv1d/cpu_step.h"

namespace seqkern::causal_conv1d::SEQKERN_ISA {
const CpuKernels kernels = {fwd, bwd, step};
}

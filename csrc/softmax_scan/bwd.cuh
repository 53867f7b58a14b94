// What the launches of the backward share.
#pragma once

#include "softmax_scan/scan.cuh"

namespace seqkern::softmax_scan::cuda {

// After the scan: adds what warps and lanes have put into the workspace to ds and to the gradient of the initial state.
void bwd_reduce(const BwdParams& p, const BwdPlan& plan, Stream stream);

}  // namespace seqkern::softmax_scan::cuda

// What the kernels of the backward share: the walk leaves the states and their gradients at the boundaries between
// chunks, and w of every token; from these the last kernel takes the gradients of a chunk's tokens by themselves.
#pragma once

#include "delta_rule/chunk.cuh"
#include "delta_rule/tile_bwd.h"

namespace seqkern::delta_rule::cuda {

constexpr int kBwdWarps = kBwdThreads / kWarpSize;

// After the walk: what is a matter of one chunk.
void bwd_tokens(const BwdParams& p, const BwdPlan& plan, Stream stream);

// The tokens of a batch row, or of a sequence of cu_seqlens.
__device__ __forceinline__ Span row_span(const Sequences& s, int64_t row) {
  return s.cu_seqlens ? packed_span(s, row) : Span{0, s.length, row, false};
}

// What the walk keeps in the workspace.
template <typename T, int kC, int kK, int kV>
struct Kept {
  const BwdParams& p;
  const BwdPlan& plan;

  // `at`: offset of the states or of their gradients. The boundary lies before token tau, which is the first of a chunk
  // but not of its sequence: no two of these are less than kC apart.
  __device__ __forceinline__ T* state(int64_t at, int64_t b, int64_t tau, int64_t hv, int64_t tile) const {
    const int64_t boundary = b * plan.boundaries + divide(tau, kC).quotient;
    return in_workspace<T>(at) + ((boundary * p.value_heads + hv) * plan.tiles + tile) * kK * kV;
  }
  // (B, L, HV, tiles kV)
  __device__ __forceinline__ Data w() const {
    const int64_t row = plan.tiles * kV, token = p.value_heads * row;
    return {in_workspace<T>(plan.w), kDType<T>, p.sequences.length * token, token, row};
  }

 private:
  template <typename X>
  __device__ __forceinline__ X* in_workspace(int64_t at) const {
    return reinterpret_cast<X*>(static_cast<unsigned char*>(p.workspace) + at);
  }
};

}  // namespace seqkern::delta_rule::cuda

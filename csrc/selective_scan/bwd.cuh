// What the kernels of the backward share.
#pragma once

#include "selective_scan/tile.h"
#include "selective_scan/warp.cuh"

namespace seqkern::selective_scan::cuda {

// dout_t = dy_t silu(z_t) in place of dy, and dy_t silu'(z_t), what dz_t has besides out_t, in place of z [gate]. A
// lane takes one channel.
template <typename R>
__device__ __forceinline__ void apply_gate(DataTile<R>& dy, DataTile<R>& z) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 4
  for (int t = 0; t < kTokens; ++t) {
    const int at = place(t, lane);
    const R gate = z.value[at], s = sigmoid(gate), gradient = dy.value[at];
    dy.value[at] = gradient * gate * s;
    z.value[at] = gradient * s * fma(gate, R(1) - s, R(1));
  }
}

// An instance of the kernel: the scalar of states, and how a warp is divided.
template <typename S_, int kStateLanes_, bool kPlain_>
struct Config {
  using S = S_;
  using R = Real<S>;
  static constexpr int kStateLanes = kStateLanes_;
  static constexpr bool kPlain = kPlain_;
  static constexpr BwdTile kTile = pick_bwd_tile(kDType<R>, kStateLanes, kPlain);
  static constexpr int kWarps = kTile.warps * kTile.sharing;  // of a block, at most
  using L = Lane<S, kStateLanes, kTile.sharing>;
  static constexpr int kWindow = kTile.window, kWindows = kTokens / kWindow;

  // A sum over the states of a lane's channels for kTogether tokens leaves one channel of one of them to each lane.
  static constexpr int kTogether = kStateLanes / L::kChannels;
  // Numbers of dB and dC of one token that a lane has a part of, and all that the warp has.
  static constexpr int kOwnSums = 2 * L::kStates * L::kParts, kSums = 2 * L::kSlice * L::kParts;
};

// B or C of one token for the states of a lane, by channel. kPlain: the same for all of them.
template <typename C>
struct ProjectionAt {
  using S = typename C::S;
  using L = typename C::L;
  static constexpr int kCount = C::kPlain ? 1 : L::kChannels;
  Vector<S, L::kStates> value[kCount];

  __device__ __forceinline__ ProjectionAt(const ProjectionTile<S, L::kSlice>& tile, const Projection& x, const L& lane,
                                          int t) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const int row = !C::kPlain && x.constant() ? lane.channel + c : t;
      value[c] = tile.template at<L::kStates>(row, lane.state);
    }
  }
  __device__ __forceinline__ const Vector<S, L::kStates>& operator[](int c) const { return value[C::kPlain ? 0 : c]; }
};

// sum + Re(conj(A) e) log2(e), A in the form that decay() takes.
template <typename R>
__device__ __forceinline__ R fma_rate(R A, R e, R sum) {
  return fma(A, e, sum);
}
template <typename R>
__device__ __forceinline__ R fma_rate(Complex<R> A, Complex<R> e, R sum) {
  return fma(A.re, e.re, fma(A.im, R(4.5323601418271942) * e.im, sum));  // pi log2(e)
}

}  // namespace seqkern::selective_scan::cuda

// The backward through a tile: what a warp keeps in shared memory and registers, and the equations.
#pragma once

#include "selective_scan/bwd.cuh"

namespace seqkern::selective_scan::cuda {

// The tiles of a warp's channels. Gradients take the place of what they follow from: ddelta that of delta', du that of
// u, dz that of dy silu'(z).
enum { kDelta, kU, kDout, kDz, kDataTiles };

// Shared memory of a block.
template <typename C>
struct Shared {
  using S = typename C::S;
  using R = typename C::R;
  using L = typename C::L;
  ProjectionTile<S, L::kSlice> projection[2];  // B, C
  struct Channels {                            // of the warps that share them
    DataTile<R> tile[kDataTiles];
  } channels[C::kTile.warps];
  struct Warp {
    alignas(16) Vector<S, L::kStates> kept[C::kWindows][L::kChannels][kWarpSize];  // states before each window
    R sums[kTokens][C::kSums + 1];  // of dB and dC, over the warp's channels
  } warp[C::kWarps];
};

// Sums over slices of states, which wait here where there are several slices.
template <typename C>
struct SlicedShared : Shared<C> {
  struct Waiting {
    DataTile<typename C::R> dx, de, out;
  } waiting[C::kTile.warps];
};

// A lane's registers and places while it works on one slice of states.
template <typename C>
struct Scan {
  using S = typename C::S;
  using R = typename C::R;
  using L = typename C::L;
  using States = typename L::States;
  static constexpr int kChannels = L::kChannels, kStates = L::kStates;
  static constexpr int kWindow = C::kWindow, kTogether = C::kTogether;
  static constexpr R kTwice = kIsComplex<S> ? R(2) : R(1);  // k of [dstate]

  const BwdParams& p;
  const L lane{};
  Shared<C>& shared;
  DataTile<R> (&tile)[kDataTiles];
  typename Shared<C>::Warp& mine;
  typename SlicedShared<C>::Waiting* waiting;  // nullptr: one slice
  bool first_slice = true, last_slice = true;
  int begin = 0, end = 0;  // of the piece

  States A, h, carry;
  // After a sum over states a lane has one channel of one of kTogether tokens.
  int own_token = lane.lane % C::kStateLanes / kChannels, own_channel = lane.channel + lane.lane % kChannels;
  R D = R(0);

  // Gradients of parameters, summed over a piece; the last two over the lane's own tokens.
  States dA, dB, dC;  // dB, dC: of constant ones, not kPlain only
  R dD, ddelta_bias;

  __device__ __forceinline__ Scan(const BwdParams& p_, Shared<C>& shared_, typename SlicedShared<C>::Waiting* waiting_)
      : p(p_),
        shared(shared_),
        tile(shared_.channels[threadIdx.x / kWarpSize / C::kTile.sharing].tile),
        mine(shared_.warp[threadIdx.x / kWarpSize]),
        waiting(waiting_) {
    L::fill(carry, R(0));
    clear_parameters();
  }

  __device__ __forceinline__ void clear_parameters() {
    L::fill(dA, R(0)), dD = R(0), ddelta_bias = R(0);
    if constexpr (!C::kPlain) L::fill(dB, R(0)), L::fill(dC, R(0));
  }

  struct Token {
    Vector<R, kChannels> delta, u;
    R delta_u[kChannels];
  };
  __device__ __forceinline__ Token token(int t) const {
    Token x{tile[kDelta].template at<kChannels>(t, lane.channel), tile[kU].template at<kChannels>(t, lane.channel), {}};
#pragma unroll
    for (int c = 0; c < kChannels; ++c) x.delta_u[c] = x.delta[c] * x.u[c];
    return x;
  }
  __device__ __forceinline__ ProjectionAt<C> B_at(int t) const { return {shared.projection[0], p.B, lane, t}; }
  __device__ __forceinline__ ProjectionAt<C> C_at(int t) const { return {shared.projection[1], p.C, lane, t}; }

  template <typename F>
  __device__ __forceinline__ static void for_each(F&& f) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int n = 0; n < kStates; ++n) f(c, n);
    }
  }

  __device__ __forceinline__ void keep(int window) const {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      Vector<S, kStates> v;
#pragma unroll
      for (int n = 0; n < kStates; ++n) v[n] = h[c][n];
      mine.kept[window][c][lane.lane] = v;
    }
  }
  __device__ __forceinline__ void recall(int window) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const Vector<S, kStates> v = mine.kept[window][c][lane.lane];
#pragma unroll
      for (int n = 0; n < kStates; ++n) h[c][n] = v[n];
    }
  }

  // h through a window [state].
  __device__ __forceinline__ void advance(int window) {
#pragma unroll 4
    for (int t = window * kWindow; t < (window + 1) * kWindow; ++t) {
      const Token x = token(t);
      const ProjectionAt<C> B = B_at(t);
      for_each([&](int c, int n) {
        const S a = decay(x.delta[c], A[c][n], !C::kPlain && p.two_exp);
        h[c][n] = fma(a, h[c][n], x.delta_u[c] * B[c][n]);
      });
    }
  }

  // Forwards through a window again, and back.
  __device__ __forceinline__ void walk_back(int window) {
    S a[kWindow][kChannels][kStates], states[kWindow][kChannels][kStates];
    recall(window);
    R out[C::kStateLanes], sums[2 * C::kStateLanes];  // by token, channel, and of `sums` kind
#pragma unroll
    for (int i = 0; i < kWindow; ++i) {
      const int t = window * kWindow + i, place_of = i % kTogether * kChannels;
      const Token x = token(t);
      const ProjectionAt<C> B = B_at(t);
      for_each([&](int c, int n) {
        a[i][c][n] = decay(x.delta[c], A[c][n], !C::kPlain && p.two_exp);
        states[i][c][n] = h[c][n] = fma(a[i][c][n], h[c][n], x.delta_u[c] * B[c][n]);
      });
      if (!p.z) continue;
      const ProjectionAt<C> C_t = C_at(t);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) out[place_of + c] = R(0);
      for_each([&](int c, int n) { out[place_of + c] = fma_real(C_t[c][n], h[c][n], out[place_of + c]); });
      if (i % kTogether < kTogether - 1) continue;
      halving_sum<C::kStateLanes / 2, 1>(out);
      finish_out(t - (kTogether - 1) + own_token, out[0]);
    }

#pragma unroll
    for (int i = kWindow - 1; i >= 0; --i) {
      if (i == 0) recall(window);
      const int t = window * kWindow + i, place_of = i % kTogether * kChannels * 2;
      const Token x = token(t);
      const auto dout = tile[kDout].template at<kChannels>(t, lane.channel);
      const ProjectionAt<C> B = B_at(t), C_t = C_at(t);
      S dBC[2 * kStates];
#pragma unroll
      for (int n = 0; n < 2 * kStates; ++n) dBC[n] = S(R(0));
#pragma unroll
      for (int c = 0; c < 2 * kChannels; ++c) sums[place_of + c] = R(0);
      for_each([&](int c, int n) {
        const R weight = kTwice * dout[c];
        R& dx = sums[place_of + 2 * c];
        R& de = sums[place_of + 2 * c + 1];
        const S g = fma(weight, conj(C_t[c][n]), carry[c][n]);  // [dstate]
        const S h_t = states[i][c][n], previous = i > 0 ? states[max(i - 1, 0)][c][n] : h[c][n];
        dBC[n] = fma(x.delta_u[c], g, dBC[n]);                        // [dB]
        dBC[kStates + n] = fma(weight, conj(h_t), dBC[kStates + n]);  // [dC]
        dx = fma_real(conj(B[c][n]), g, dx);                          // [du]
        carry[c][n] = conj(a[i][c][n]) * g;
        const S e = conj(previous) * (!C::kPlain && p.two_exp ? carry[c][n] + g : carry[c][n]);  // [dA]
        dA[c][n] = fma(x.delta[c], e, dA[c][n]);
        de = fma_rate(A[c][n], e, de);  // [ddelta]
        if constexpr (!C::kPlain) {
          dB[c][n] = fma(x.delta_u[c], g, dB[c][n]);
          dC[c][n] = fma(weight, conj(h_t), dC[c][n]);
        }
      });
      if (C::kPlain || !p.B.constant() || !p.C.constant()) add_channels(t, dBC);
      if (i % kTogether > 0) continue;
      halving_sum<C::kStateLanes / 2, 1>(sums);
      __syncwarp();  // all lanes have read the tokens whose gradients take their place
      finish_token(t + own_token, sums[0], sums[1] * R(0.69314718055994531));
    }
  }

  // Sums of dB and dC over the channels of the warp.
  __device__ __forceinline__ void add_channels(int t, const S (&dBC)[2 * kStates]) const {
    R v[C::kOwnSums];
    memcpy(v, dBC, sizeof v);
    halving_sum<kWarpSize / 2, C::kStateLanes>(v);
    constexpr int kHolders = kWarpSize / C::kOwnSums;  // lanes that have a state in common, or the same sum
    if (lane.lane % kHolders / C::kStateLanes > 0) return;
    const int own = lane.lane / kHolders, half = C::kOwnSums / 2;
    mine.sums[t][own / half * (C::kSums / 2) + lane.state * L::kParts + own % half] = v[0];
  }

  __device__ __forceinline__ void clear_sums() const {
#pragma unroll 1
    for (int t = 0; t < kTokens; ++t) {
      for (int j = lane.lane; j < C::kSums; j += kWarpSize) mine.sums[t][j] = R(0);
    }
  }

  // dz_t = dy_t silu'(z_t) out_t [gate]
  __device__ __forceinline__ void finish_out(int t, R out) const {
    const int at = place(t, own_channel);
    out *= kTwice;
    if (waiting) {
      if (!first_slice) out += waiting->out.value[at];
      if (!last_slice) {
        waiting->out.value[at] = out;
        return;
      }
    }
    tile[kDz].value[at] *= fma(D, tile[kU].value[at], out);
  }

  // dx = sum_n B g and de = sum_n A e of a token and channel.
  __device__ __forceinline__ void finish_token(int t, R dx, R de) {
    const int at = place(t, own_channel);
    if (waiting) {
      if (!first_slice) dx += waiting->dx.value[at], de += waiting->de.value[at];
      if (!last_slice) {
        waiting->dx.value[at] = dx, waiting->de.value[at] = de;
        return;
      }
    }
    const R delta = tile[kDelta].value[at], u = tile[kU].value[at], dout = tile[kDout].value[at];
    R ddelta = fma(u, dx, de);
    if (p.softplus) ddelta *= -expm1(-delta);  // sigmoid(x) = 1 - exp(-softplus(x))
    tile[kDelta].value[at] = ddelta;
    tile[kU].value[at] = fma(D, dout, delta * dx);
    dD = fma(dout, u, dD), ddelta_bias += begin <= t && t < end ? ddelta : R(0);
  }
};

}  // namespace seqkern::selective_scan::cuda

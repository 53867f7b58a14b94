// Chunks of tiles that are too large for the shared memory of the smallest devices: what the loads and products of
// tensor cores do not touch lies in the workspace, a room for each block, and in the caches.
#pragma once

#include <new>

#include "linear_attention/bwd_key.cuh"
#include "linear_attention/bwd_token.cuh"

namespace seqkern::linear_attention::cuda {

// The members have the names and the meaning that they have in shared memory (KeyShared, TokenShared), where references
// to them are.
template <typename T, int kC, int kV>
struct KeyRoom {
  using R = Accumulator<T>;
  using Cut = Products<T, kC, kMaxKeys, kV>;

  Matrix<R, kC, kMaxKeys> read, carry, dq, dk;
  R dP[kC][kC], scores[kMaxKeys / kWarpSize][kC][kC], dots[Cut::kValueWarps][kMaxKeys], total[kMaxKeys];
};
template <typename T, int kC, int kV>
struct KeyRoomOf {
  using Room = KeyRoom<T, kC, kV>;
  decltype(Room::read)&read, &carry, &dq, &dk;
  decltype(Room::dP)& dP;
  decltype(Room::scores)& scores;
  decltype(Room::dots)& dots;
  decltype(Room::total)& total;

  __device__ explicit KeyRoomOf(Room& x)
      : read(x.read), carry(x.carry), dq(x.dq), dk(x.dk), dP(x.dP), scores(x.scores), dots(x.dots), total(x.total) {}
};
template <typename T, int kC, int kV>
struct KeyShared<T, kC, kMaxKeys, kV> : WalkShared<T, kC, kMaxKeys, kV>, KeyRoomOf<T, kC, kV> {
  using InRoom = KeyRoomOf<T, kC, kV>;
};

template <int kC, int kK, int kV>
struct TokenRoom {
  using Cut = Products<double, kC, kK, kV>;

  Matrix<double, kC, kC> dP;
  double q_sums[Cut::columns(kK)][kC], k_sums[Cut::columns(kK)][kC];
};
template <int kC, int kK, int kV>
struct TokenRoomOf {
  using Room = TokenRoom<kC, kK, kV>;
  decltype(Room::dP)& dP;
  decltype(Room::q_sums)&q_sums, &k_sums;

  __device__ explicit TokenRoomOf(Room& x) : dP(x.dP), q_sums(x.q_sums), k_sums(x.k_sums) {}
};
template <int kC, int kK, int kV>
struct TokenShared<double, kC, kK, kV> : WalkShared<double, kC, kK, kV>, TokenRoomOf<kC, kK, kV> {
  using InRoom = TokenRoomOf<kC, kK, kV>;
  using Cut = Products<double, kC, kK, kV>;

  TokenGates<double, kC> gates;
  double to_end[kC], before[kC];
  double row_sums[Cut::columns(kC)][kC], column_sums[Cut::kTokenWarps][kC];
};

template <typename Shared>
constexpr int64_t room_bytes() {
  if constexpr (requires { typename Shared::InRoom; })
    return sizeof(typename Shared::InRoom::Room);
  else
    return 0;
}
// All threads take part.
template <typename Shared>
__device__ __forceinline__ void take_room(Shared& shared, void* workspace, int64_t rooms) {
  if constexpr (requires { typename Shared::InRoom; }) {
    using InRoom = typename Shared::InRoom;
    auto* const room = reinterpret_cast<typename InRoom::Room*>(static_cast<unsigned char*>(workspace) + rooms);
    if (threadIdx.x == 0) new (static_cast<InRoom*>(&shared)) InRoom(room[blockIdx.x]);
    __syncthreads();
  }
}

}  // namespace seqkern::linear_attention::cuda

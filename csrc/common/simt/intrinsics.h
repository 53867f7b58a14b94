// CUDA's intrinsics for threads that work together: barriers, shuffles, votes, atomics, fences.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/simt/runtime.h"
#include "common/simt/types.h"

inline constexpr int warpSize = 32;

inline void __syncthreads(seqkern::simt::Site where = seqkern::simt::Site::current()) {
  seqkern::simt::block_barrier(where);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, seqkern::simt::Site where = seqkern::simt::Site::current()) {
  seqkern::simt::meet("__syncwarp", mask, where, nullptr, nullptr, true);
}

// --- shuffles

namespace seqkern::simt {

template <typename T>
inline constexpr bool kCanShuffle =
    (std::is_arithmetic_v<T> && sizeof(T) >= 4) || std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>;

// Every lane names the lane it reads. Reading a lane that is not there is undefined: all bits of the result are set.
template <typename T>
T shuffle(const char* operation, unsigned mask, T value, unsigned source, Site where) {
  static_assert(kCanShuffle<T> && sizeof(T) <= 8, "CUDA has no shuffle of this type");
  struct Record {
    T value, result;
    unsigned source;
  } mine{value, value, source};
  meet(operation, mask, where, mine, [](Lanes<Record> lanes) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!lanes.has(lane)) continue;
      Record& reader = lanes[lane];
      if (lanes.has(reader.source)) {
        reader.result = lanes[reader.source].value;
      } else {
        std::memset(static_cast<void*>(&reader.result), 0xff, sizeof(T));
      }
    }
  });
  return mine.result;
}

}  // namespace seqkern::simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              seqkern::simt::Site where = seqkern::simt::Site::current()) {
  const unsigned segment = seqkern::simt::lane() & ~(width - 1u);
  return seqkern::simt::shuffle("__shfl_sync", mask, value, segment | (source & (width - 1u)), where);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 seqkern::simt::Site where = seqkern::simt::Site::current()) {
  const unsigned lane = seqkern::simt::lane(), within = lane & (width - 1u);
  return seqkern::simt::shuffle("__shfl_up_sync", mask, value, within >= delta ? lane - delta : lane, where);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   seqkern::simt::Site where = seqkern::simt::Site::current()) {
  const unsigned lane = seqkern::simt::lane(), within = lane & (width - 1u);
  const bool inside = delta < width - within;
  return seqkern::simt::shuffle("__shfl_down_sync", mask, value, inside ? lane + delta : lane, where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  seqkern::simt::Site where = seqkern::simt::Site::current()) {
  const unsigned lane = seqkern::simt::lane(), last = lane | (width - 1u), source = lane ^ lane_mask;
  return seqkern::simt::shuffle("__shfl_xor_sync", mask, value, source <= last ? source : lane, where);
}

// --- votes

namespace seqkern::simt {

inline unsigned ballot(const char* operation, unsigned mask, bool predicate, Site where) {
  struct Record {
    bool predicate;
    unsigned votes;
  } mine{predicate, 0};
  meet(operation, mask, where, mine, [](Lanes<Record> lanes) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (lanes.has(lane) && lanes[lane].predicate) votes |= 1u << lane;
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (lanes.has(lane)) lanes[lane].votes = votes;
    }
  });
  return mine.votes;
}

}  // namespace seqkern::simt

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              seqkern::simt::Site where = seqkern::simt::Site::current()) {
  return seqkern::simt::ballot("__ballot_sync", mask, predicate != 0, where);
}

inline int __any_sync(unsigned mask, int predicate, seqkern::simt::Site where = seqkern::simt::Site::current()) {
  return seqkern::simt::ballot("__any_sync", mask, predicate != 0, where) != 0;
}

inline int __all_sync(unsigned mask, int predicate, seqkern::simt::Site where = seqkern::simt::Site::current()) {
  return seqkern::simt::ballot("__all_sync", mask, predicate == 0, where) == 0;
}

// --- atomics and fences

// Relaxed, as CUDA's are: they order no other memory.
namespace seqkern::simt {

template <typename T, typename Update>
T atomic_update(T* address, Update update) {
  T expected, desired;
  __atomic_load(address, &expected, __ATOMIC_RELAXED);
  do {
    desired = update(expected);
  } while (!__atomic_compare_exchange(address, &expected, &desired, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return expected;
}

}  // namespace seqkern::simt

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return seqkern::simt::atomic_update(address, [=](T old) { return static_cast<T>(old + value); });
}

template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return seqkern::simt::atomic_update(address, [=](T old) { return old < value ? value : old; });
}

template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return seqkern::simt::atomic_update(address, [=](T old) { return value < old ? value : old; });
}

template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return seqkern::simt::atomic_update(address, [=](T) { return value; });
}

template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  __atomic_compare_exchange(address, &compare, &value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return compare;  // what was there
}

inline void __threadfence() {
  seqkern::simt::fence();
}
inline void __threadfence_block() {
  seqkern::simt::fence();
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

// Threads of a block that exchange values through shared memory.
#include "case.h"
#include "common/reduce.cuh"

using namespace seqkern;

namespace {

constexpr int kThreads = 96;

struct Shared {
  float value[kThreads];
};

// y = x reversed, rounds times.
template <bool kBarrier>
__global__ void reverse(const float* x, float* y, int rounds) {
  Shared& s = shared_memory<Shared>();
  float mine = x[threadIdx.x];
  for (int round = 0; round < rounds; ++round) {
    s.value[threadIdx.x] = mine;
    if (kBarrier) __syncthreads();
    mine = s.value[kThreads - 1 - threadIdx.x];
    __syncthreads();
  }
  y[threadIdx.x] = mine;
}

template <bool kBarrier>
void run_reverse() {
  Array<float> x(kThreads), y(kThreads);
  for (int i = 0; i < kThreads; ++i) x[i] = static_cast<float>(i);
  launch({.name = "reverse", .grid = {}, .threads = kThreads, .smem_bytes = sizeof(Shared)}, reverse<kBarrier>, x.data,
         y.data, 3);
  expect("y", y, [](int i) { return static_cast<float>(kThreads - 1 - i); });
}

const Case barrier("barrier", run_reverse<true>);
const Fault missing_barrier("missing_barrier", run_reverse<false>);

__global__ void add_up(const float* x, float* sums) {
  struct Partial {
    float value[kThreads / kWarpSize];
  };
  const float first = block_sum<kThreads>(x[threadIdx.x], shared_memory<Partial>().value);
  sums[threadIdx.x] = block_sum<kThreads>(first, shared_memory<Partial>().value);
}

const Case sum_of_block("sum_of_block", [] {
  Array<float> x(kThreads, 2.0f), sums(kThreads);
  launch({.name = "add_up", .grid = {}, .threads = kThreads, .smem_bytes = 16}, add_up, x.data, sums.data);
  expect("sums", sums, [](int) { return 2.0f * kThreads * kThreads; });
});

// Within a warp: neighbours exchange values through shared memory.
template <bool kBarrier>
__global__ void rotate(float* y) {
  Shared& s = shared_memory<Shared>();
  s.value[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (kBarrier) {
    __syncwarp();
  } else {
    __shfl_sync(0xffffffffu, 0, 0);  // brings the lanes together, but orders no memory
  }
  y[threadIdx.x] = s.value[threadIdx.x / 32 * 32 + (threadIdx.x + 1) % 32];
}

template <bool kBarrier>
void run_rotate() {
  Array<float> y(kThreads);
  launch({.name = "rotate", .grid = {}, .threads = kThreads, .smem_bytes = sizeof(Shared)}, rotate<kBarrier>, y.data);
  expect("y", y, [](int i) { return static_cast<float>(i / 32 * 32 + (i + 1) % 32); });
}

const Case warp_barrier("warp_barrier", run_rotate<true>);
const Fault shuffle_as_barrier("shuffle_as_barrier", run_rotate<false>);

__global__ void sync_in_one_branch() {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void sync_in_two_branches() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

const Fault barrier_in_one_branch("barrier_in_one_branch", [] {
  launch({.name = "sync_in_one_branch", .grid = {}, .threads = 64}, sync_in_one_branch);
});

const Fault barrier_in_two_branches("barrier_in_two_branches", [] {
  launch({.name = "sync_in_two_branches", .grid = {}, .threads = 64}, sync_in_two_branches);
});

}  // namespace

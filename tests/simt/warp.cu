// Shuffles and votes.
#include "case.h"

using namespace seqkern;

namespace {

constexpr unsigned kAll = 0xffffffffu;

template <typename Kernel>
Array<int>& run_warp(Array<int>& y, Kernel kernel) {
  launch({.name = "warp", .grid = {}, .threads = 32}, kernel, y.data);
  return y;
}

__global__ void up(int* y) {
  y[threadIdx.x] = __shfl_up_sync(kAll, static_cast<int>(threadIdx.x), 3);
}
__global__ void down(int* y) {
  y[threadIdx.x] = __shfl_down_sync(kAll, static_cast<int>(threadIdx.x), 3);
}
__global__ void from_five(int* y) {
  y[threadIdx.x] = __shfl_sync(kAll, static_cast<int>(threadIdx.x), 5);
}
__global__ void butterfly(int* y) {
  y[threadIdx.x] = __shfl_xor_sync(kAll, static_cast<int>(threadIdx.x), 9);
}

const Case shuffles("shuffles", [] {
  Array<int> y(32);
  expect("up", run_warp(y, up), [](int i) { return i < 3 ? i : i - 3; });
  expect("down", run_warp(y, down), [](int i) { return i > 28 ? i : i + 3; });
  expect("from_five", run_warp(y, from_five), [](int) { return 5; });
  expect("butterfly", run_warp(y, butterfly), [](int i) { return i ^ 9; });
});

__global__ void up_in_eights(int* y) {
  y[threadIdx.x] = __shfl_up_sync(kAll, static_cast<int>(threadIdx.x), 3, 8);
}
__global__ void down_in_eights(int* y) {
  y[threadIdx.x] = __shfl_down_sync(kAll, static_cast<int>(threadIdx.x), 3, 8);
}
__global__ void from_ten_in_eights(int* y) {
  y[threadIdx.x] = __shfl_sync(kAll, static_cast<int>(threadIdx.x), 10, 8);
}
__global__ void butterfly_in_eights(int* y) {
  y[threadIdx.x] = __shfl_xor_sync(kAll, static_cast<int>(threadIdx.x), 8, 8);
}

const Case shuffles_of_width_8("shuffles_of_width_8", [] {
  Array<int> y(32);
  expect("up", run_warp(y, up_in_eights), [](int i) { return i % 8 < 3 ? i : i - 3; });
  expect("down", run_warp(y, down_in_eights), [](int i) { return i % 8 > 4 ? i : i + 3; });
  expect("from_ten", run_warp(y, from_ten_in_eights), [](int i) { return i / 8 * 8 + 2; });
  // Lanes may look into an earlier segment, not into a later one.
  expect("butterfly", run_warp(y, butterfly_in_eights), [](int i) { return i & 8 ? i ^ 8 : i; });
});

// Two halves of a warp, each on a way of its own, with different numbers of operations.
__global__ void halves(int* y) {
  int value = static_cast<int>(threadIdx.x);
  if (threadIdx.x < 16) {
    for (int i = 0; i < 3; ++i) value = __shfl_xor_sync(0x0000ffffu, value, 1);
  } else {
    value = __shfl_xor_sync(0xffff0000u, value, 2);
  }
  __syncwarp();
  y[threadIdx.x] = __shfl_xor_sync(kAll, value, 16);
}

const Case shuffles_of_halves("shuffles_of_halves", [] {
  Array<int> y(32);
  expect("halves", run_warp(y, halves), [](int i) { return i < 16 ? (i ^ 16) ^ 2 : (i ^ 16) ^ 1; });
});

__global__ void votes(int* y) {
  const int odd = threadIdx.x % 2;
  const unsigned ballot = __ballot_sync(kAll, odd);
  y[threadIdx.x] = (ballot == 0xaaaaaaaau) + 2 * __any_sync(kAll, odd) + 4 * !__all_sync(kAll, odd) +
                   8 * !__any_sync(kAll, 0) + 16 * __all_sync(kAll, 1);
}

const Case ballots("ballots", [] {
  Array<int> y(32);
  expect("votes", run_warp(y, votes), [](int) { return 31; });
});

__global__ void sum_of_types(int* y) {
  const int i = static_cast<int>(threadIdx.x);
  const double d = __shfl_xor_sync(kAll, static_cast<double>(i), 1);
  const float f = __shfl_xor_sync(kAll, static_cast<float>(i), 1);
  const float h = __half2float(__shfl_xor_sync(kAll, __float2half(static_cast<float>(i)), 1));
  const float b = __bfloat162float(__shfl_xor_sync(kAll, __float2bfloat16(static_cast<float>(i)), 1));
  const long long l = __shfl_xor_sync(kAll, static_cast<long long>(i), 1);
  y[i] = static_cast<int>(d + f + h + b) + static_cast<int>(l);
}

const Case shuffles_of_types("shuffles_of_types", [] {
  Array<int> y(32);
  expect("sum_of_types", run_warp(y, sum_of_types), [](int i) { return 5 * (i ^ 1); });
});

// --- planted bugs

__global__ void shuffle_in_a_branch(int* y) {
  if (threadIdx.x < 16) {
    y[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
  } else {
    __syncwarp();
  }
}

__global__ void shuffle_against_barrier(int* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
  __syncthreads();
}

__global__ void outside_its_mask(int* y) {
  y[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 0);
}

__global__ void differing_masks(int* y) {
  y[threadIdx.x] = __shfl_sync(threadIdx.x < 16 ? 0x00ffffffu : 0xffffff00u, 1, 0);
}

__global__ void reads_an_absent_lane(int* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 20);
}

const Fault divergent_shuffle("divergent_shuffle", [] {
  Array<int> y(32);
  run_warp(y, shuffle_in_a_branch);
});

const Fault shuffle_and_barrier("shuffle_and_barrier", [] {
  Array<int> y(32);
  run_warp(y, shuffle_against_barrier);
});

const Fault lane_outside_its_mask("lane_outside_its_mask", [] {
  Array<int> y(32);
  run_warp(y, outside_its_mask);
});

const Fault masks_that_differ("masks_that_differ", [] {
  Array<int> y(32);
  run_warp(y, differing_masks);
});

// Undefined on a device; here all bits are set, which is NaN for floats.
const Case absent_lane("absent_lane", [] {
  Array<int> y(32);
  expect("y", run_warp(y, reads_an_absent_lane), [](int i) { return i < 16 ? -1 : 0; });
});

}  // namespace

// Blocks that work together: flags, tickets, atomics.
#include "case.h"

using namespace seqkern;

namespace {

// Prefix sums by look-back: a block waits for its predecessor's total, adds its own and hands it on.
__global__ void look_back(const int* x, int* totals, int* flags) {
  const int block = static_cast<int>(blockIdx.x);
  int total = x[block];
  if (block > 0) {
    spin_until([&] { return load_acquire(&flags[block - 1]) == 1; });
    total += totals[block - 1];
  }
  totals[block] = total;
  store_release(&flags[block], 1);
}

const Case lookback("lookback", [] {
  const int blocks = 150;  // more than are resident
  Array<int> x(blocks, 2), totals(blocks), flags(blocks, 0);
  launch({.name = "look_back", .grid = {.x = blocks}, .threads = 1}, look_back, x.data, totals.data, flags.data);
  expect("totals", totals, [](int i) { return 2 * (i + 1); });
});

// Every block waits for all: possible only while all are resident.
__global__ void meet_all(int* arrived, int* x, int* y) {
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  if (threadIdx.x == 0) {
    x[block] = block;
    __threadfence();
    atomicAdd(arrived, 1);
    spin_until([&] { return load_acquire(arrived) == blocks; });
  }
  __syncthreads();
  if (threadIdx.x == 1) y[block] = x[blocks - 1 - block];
}

void run_meet_all(int blocks) {
  Array<int> arrived(1, 0), x(blocks), y(blocks);
  launch({.name = "meet_all", .grid = {.x = blocks}, .threads = 32}, meet_all, arrived.data, x.data, y.data);
  expect("y", y, [=](int i) { return blocks - 1 - i; });
}

const Case barrier_of_the_grid("barrier_of_the_grid", [] { run_meet_all(20); });
const Fault too_many_blocks_for_a_barrier("too_many_blocks_for_a_barrier", [] { run_meet_all(140); });

__global__ void wait_for_nobody(int* flag) {
  if (threadIdx.x == 0) spin_until([&] { return load_acquire(flag) == 1; });
  __syncthreads();
}

const Fault flag_that_nobody_sets("flag_that_nobody_sets", [] {
  Array<int> flag(1, 0);
  launch({.name = "wait_for_nobody", .grid = {.x = 2}, .threads = 64}, wait_for_nobody, flag.data);
});

// The block that comes last adds up what all have written.
template <bool kFence>
__global__ void last_block_adds(int* partial, int* tickets, int* sum) {
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = static_cast<int>(blockIdx.x);
  if (kFence) __threadfence();
  const bool last = atomicAdd(tickets, 1) == static_cast<int>(gridDim.x) - 1;
  if (kFence) __threadfence();
  if (!last) return;
  for (unsigned i = 0; i < gridDim.x; ++i) *sum += partial[i];
}

template <bool kFence>
void run_last_block_adds() {
  Array<int> partial(4), tickets(1, 0), sum(1, 0);
  launch({.name = "last_block_adds", .grid = {.x = 4}, .threads = 32}, last_block_adds<kFence>, partial.data,
         tickets.data, sum.data);
  expect("sum", sum, [](int) { return 6; });
}

const Case last_block("last_block", run_last_block_adds<true>);
const Fault missing_fence("missing_fence", run_last_block_adds<false>);

// Blocks that write the same place without atomics.
__global__ void overwrite(int* y) {
  y[threadIdx.x] = static_cast<int>(threadIdx.x);
}

const Fault race_of_blocks("race_of_blocks", [] {
  Array<int> y(32);
  launch({.name = "overwrite", .grid = {.x = 3}, .threads = 32}, overwrite, y.data);
});

__global__ void use_atomics(int* counts, float* sum, double* sum_64) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&counts[0], 1);
  atomicMax(&counts[1], i);
  atomicMin(&counts[2], i);
  atomicExch(&counts[3], 7);
  atomicCAS(&counts[4], 0, 1);
  atomicAdd(sum, 1.0f);
  atomicAdd(sum_64, 0.5);
}

const Case atomics("atomics", [] {
  Array<int> counts(5, 0);
  Array<float> sum(1, 0.0f);
  Array<double> sum_64(1, 0.0);
  launch({.name = "use_atomics", .grid = {.x = 4}, .threads = 96}, use_atomics, counts.data, sum.data, sum_64.data);
  const int want[] = {384, 383, 0, 7, 1};
  expect("counts", counts, [&](int i) { return want[i]; });
  expect("sum", sum, [](int) { return 384.0f; });
  expect("sum_64", sum_64, [](int) { return 192.0; });
});

__global__ void write_index(int* y) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  y[block * blockDim.x + threadIdx.x] = static_cast<int>(1000 * blockIdx.z + 100 * blockIdx.y + 10 * blockIdx.x);
}

const Case indices("indices", [] {
  Array<int> y(2 * 3 * 4 * 5);
  launch({.name = "write_index", .grid = {.x = 2, .y = 3, .z = 4}, .threads = 5}, write_index, y.data);
  expect("y", y, [](int i) { return i / 30 * 1000 + i / 10 % 3 * 100 + i / 5 % 2 * 10; });
});

}  // namespace

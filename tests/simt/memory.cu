// Shared memory, vector accesses, asynchronous copies, counters.
#include <cmath>

#include "case.h"
#include "common/async.cuh"
#include "common/load.cuh"

using namespace seqkern;

extern "C" {
int64_t seqkern_simt_launches();
int64_t seqkern_simt_bytes_read();
int64_t seqkern_simt_bytes_written();
void seqkern_simt_reset();
}

namespace {

struct Shared {
  float value[64];
};

// --- shared memory

__global__ void read_dynamic(float* y) {
  Shared& s = shared_memory<Shared>();
  y[blockIdx.x * 64 + threadIdx.x] = s.value[threadIdx.x];
  s.value[threadIdx.x] = 1.0f;  // must not be seen by the next block
}

__global__ void read_static(float* y) {
  __shared__ float value[64];
  y[blockIdx.x * 64 + threadIdx.x] = value[threadIdx.x];
  value[threadIdx.x] = 1.0f;
}

template <typename Kernel>
void expect_nan(Kernel kernel, int blocks) {
  Array<float> y(64 * blocks);
  launch({.name = "read", .grid = {.x = blocks}, .threads = 64, .smem_bytes = sizeof(Shared)}, kernel, y.data);
  for (const float value : y) expect("NaN in shared memory that nobody wrote", std::isnan(value));
}

const Case dynamic_shared_is_nan("dynamic_shared_is_nan", [] { expect_nan(read_dynamic, 3); });
// One block, because ThreadSanitizer takes the static variables of two blocks for the same.
const Case static_shared_is_nan("static_shared_is_nan", [] { expect_nan(read_static, 1); });

// Both blocks are resident and take turns; each has its own static variables.
__global__ void static_of_two_blocks(int* flags, float* y) {
  __shared__ float value;
  if (threadIdx.x == 0) value = static_cast<float>(blockIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) {
    store_release(&flags[blockIdx.x], 1);
    spin_until([&] { return load_acquire(&flags[1 - blockIdx.x]) == 1; });
  }
  __syncthreads();
  y[blockIdx.x * 64 + threadIdx.x] = value;
}

const Fault static_shared_of_two_blocks("static_shared_of_two_blocks", [] {
  Array<int> flags(2, 0);
  Array<float> y(128);
  launch({.name = "static_of_two_blocks", .grid = {.x = 2}, .threads = 64}, static_of_two_blocks, flags.data, y.data);
  expect("y", y, [](int i) { return static_cast<float>(i / 64); });
});

const Fault too_little_shared_memory("too_little_shared_memory", [] {
  Array<float> y(64);
  launch({.name = "read_dynamic", .grid = {}, .threads = 64, .smem_bytes = 128}, read_dynamic, y.data);
});

const Fault too_much_shared_memory("too_much_shared_memory", [] {
  Array<float> y(64);
  launch({.name = "read_dynamic", .grid = {}, .threads = 64, .smem_bytes = 1 << 20}, read_dynamic, y.data);
});

const Fault too_many_threads("too_many_threads", [] {
  Array<float> y(64);
  launch({.name = "read_dynamic", .grid = {.x = 2, .y = 3}, .threads = 2048}, read_dynamic, y.data);
});

// --- indices that are out of bounds

__global__ void copy_one_too_many(const float* x, float* y, int n) {
  if (static_cast<int>(threadIdx.x) <= n) y[threadIdx.x] = x[threadIdx.x];
}

__global__ void write_behind_shared_memory(int offset) {
  shared_memory<float>() = 0.0f;
  (&shared_memory<float>())[threadIdx.x + offset] = 1.0f;
}

__global__ void write_behind_member(int offset) {
  shared_memory<Shared>().value[threadIdx.x + offset] = 1.0f;
}

const Fault global_out_of_bounds("global_out_of_bounds", [] {
  Array<float> x(48), y(64);
  launch({.name = "copy_one_too_many", .grid = {}, .threads = 64}, copy_one_too_many, x.data, y.data, 48);
});

const Fault shared_out_of_bounds("shared_out_of_bounds", [] {
  launch({.name = "write_behind_shared_memory", .grid = {}, .threads = 64, .smem_bytes = 256},
         write_behind_shared_memory, 1);
});

const Fault member_out_of_bounds("member_out_of_bounds", [] {
  launch({.name = "write_behind_member", .grid = {}, .threads = 64, .smem_bytes = 512}, write_behind_member, 1);
});

// --- vectors

// y[0 .. n) = 2 x[0 .. n), 8 elements to a thread, whatever n is.
__global__ void twice(const __nv_bfloat16* x, float* y, int n) {
  const int first = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
  Vector<float, 8> v = convert<float>(load<8>(x + first, n - first));
  for (int i = 0; i < 8; ++i) v[i] *= 2.0f;
  store(y + first, v, n - first);
}

const Case vectors_with_tails("vectors_with_tails", [] {
  for (int n : {1, 7, 8, 9, 255, 256, 300}) {
    Array<__nv_bfloat16> x(n);
    Array<float> y(n);
    for (int i = 0; i < n; ++i) x[i] = __float2bfloat16(static_cast<float>(i % 100));
    seqkern_simt_reset();
    launch({.name = "twice", .grid = {.x = (n + 255) / 256}, .threads = 32}, twice, x.data, y.data, n);
    expect("y", y, [](int i) { return 2.0f * static_cast<float>(i % 100); });
    expect("one launch", seqkern_simt_launches() == 1);
    expect("2 bytes read per element", seqkern_simt_bytes_read() == 2 * n);
    expect("4 bytes written per element", seqkern_simt_bytes_written() == 4 * n);
  }
});

__global__ void fill_shared() {
  store(shared_memory<Shared>().value + 4 * threadIdx.x, Vector<float, 4>{});
}

const Case counters_leave_out_shared_memory("counters_leave_out_shared_memory", [] {
  seqkern_simt_reset();
  launch({.name = "fill_shared", .grid = {}, .threads = 16, .smem_bytes = sizeof(Shared)}, fill_shared);
  expect("no bytes of global memory", seqkern_simt_bytes_written() == 0);
});

const Case empty_grid("empty_grid", [] {
  seqkern_simt_reset();
  launch({.name = "fill_shared", .grid = {.x = 0}, .threads = 16}, fill_shared);
  expect("no launch", seqkern_simt_launches() == 0);
});

__global__ void load_from(const float* x, float* y) {
  store(y, load<4>(x));
}

const Fault misaligned_vector("misaligned_vector", [] {
  Array<float> x(8), y(4);
  launch({.name = "load_from", .grid = {}, .threads = 1}, load_from, x.data + 1, y.data);
});

// --- cp.async

struct Stages {
  float value[2][128];  // 4 of a thread
};

// y = sum of the rows of x (rows, 128), two rows in flight.
template <bool kWait>
__global__ void sum_rows(const float* x, float* y, int rows) {
  Stages& s = shared_memory<Stages>();
  const int own = 4 * threadIdx.x;
  Vector<float, 4> sum{};
  copy_async<16>(&s.value[0][own], x + own);
  commit_copies();
  for (int row = 0; row < rows; ++row) {
    if (row + 1 < rows) copy_async<16>(&s.value[(row + 1) % 2][own], x + (row + 1) * 128 + own);
    commit_copies();
    if (kWait) wait_copies<1>();
    for (int i = 0; i < 4; ++i) sum[i] += s.value[row % 2][own + i];
  }
  store(y + own, sum);
}

template <bool kWait>
void run_sum_rows() {
  const int rows = 5;
  Array<float> x(128 * rows), y(128);
  for (int i = 0; i < 128 * rows; ++i) x[i] = static_cast<float>(i);
  launch({.name = "sum_rows", .grid = {}, .threads = 32, .smem_bytes = sizeof(Stages)}, sum_rows<kWait>, x.data, y.data,
         rows);
  expect("y", y, [](int i) { return static_cast<float>(5 * i + 1280); });
}

const Case async_copies("async_copies", run_sum_rows<true>);
const Fault missing_wait("missing_wait", run_sum_rows<false>);

__global__ void copy_tail(const float* x, float* y, int n) {
  Stages& s = shared_memory<Stages>();
  const int own = 2 * threadIdx.x, valid = max(0, min(2, n - own));
  copy_async<8>(&s.value[0][own], x + (valid ? own : 0), 4 * valid);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  y[threadIdx.x] = s.value[0][threadIdx.x];
}

const Case async_copies_fill_with_zeros("async_copies_fill_with_zeros", [] {
  Array<float> x(19, 3.0f), y(64);
  launch({.name = "copy_tail", .grid = {}, .threads = 64, .smem_bytes = sizeof(Stages)}, copy_tail, x.data, y.data, 19);
  expect("y", y, [](int i) { return i < 19 ? 3.0f : 0.0f; });
});

}  // namespace

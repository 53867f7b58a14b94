// Matrix products by fragments against plain sums of products.
#include <cmath>
#include <random>

#include "case.h"
#include "common/mma.cuh"

using namespace seqkern;

namespace {

template <typename T>
struct Tiles {
  alignas(16) T a[16][16];  // (M, K)
  alignas(16) T b[16][8];   // (K, N): transposed while it is loaded
};

template <typename T>
__global__ void multiply_16(const T* a, const T* b, float* d) {
  Tiles<T>& s = shared_memory<Tiles<T>>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * 16; i += 32) s.a[i / 16][i % 16] = a[i];
  for (int i = lane; i < 16 * 8; i += 32) s.b[i / 8][i % 8] = b[i];
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[2];
  load_matrix(fragment_a, &s.a[lane % 16][lane / 16 * 8]);
  load_matrix<true>(fragment_b, &s.b[lane % 16][0]);
  const int g = lane / 4, q = lane % 4;
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = d[(g + i / 2 * 8) * 8 + 2 * q + i % 2];
  mma_m16n8k16<T>(sum, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = sum[i];
}

__global__ void multiply_tf32(const float* a, const float* b, float* d) {
  const int g = threadIdx.x / 4, q = threadIdx.x % 4;
  uint32_t fragment_a[4], fragment_b[2];
  for (int i = 0; i < 4; ++i) fragment_a[i] = to_tf32(a[(g + i % 2 * 8) * 8 + q + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) fragment_b[i] = to_tf32(b[(q + i * 4) * 8 + g]);
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = d[(g + i / 2 * 8) * 8 + 2 * q + i % 2];
  mma_m16n8k8_tf32(sum, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = sum[i];
}

// d = 1 + a b with a (16, depth) and b (depth, 8).
template <typename T, typename Kernel, typename Round>
void check_product(Kernel kernel, int depth, int64_t smem_bytes, Round round) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  Array<T> a(16 * depth), b(depth * 8);
  Array<float> d(16 * 8, 1.0f);
  for (T& value : a) value = static_cast<T>(normal(generator));
  for (T& value : b) value = static_cast<T>(normal(generator));
  launch({.name = "multiply", .grid = {}, .threads = 32, .smem_bytes = smem_bytes}, kernel, a.data, b.data, d.data);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double sum = 1.0;
      for (int k = 0; k < depth; ++k) {
        sum += static_cast<double>(round(a[row * depth + k])) * static_cast<double>(round(b[k * 8 + column]));
      }
      expect("d = 1 + a b", std::fabs(d[row * 8 + column] - sum) < 1e-5);
    }
  }
}

template <typename T>
void check_product_16() {
  check_product<T>(multiply_16<T>, 16, sizeof(Tiles<T>), [](T value) { return static_cast<float>(value); });
}

// 10 bits of mantissa, to nearest; no value is half-way by chance.
float round_to_tf32(float value) {
  int exponent;
  const float mantissa = std::frexp(value, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(mantissa, 11)), exponent - 11);
}

const Case mma_bfloat16("mma_bfloat16", check_product_16<__nv_bfloat16>);
const Case mma_half("mma_half", check_product_16<__half>);
const Case mma_tf32("mma_tf32", [] { check_product<float>(multiply_tf32, 8, 0, round_to_tf32); });

// --- ldmatrix: element (r, c) of matrix i is 100 i + 10 r + c

template <int kCount, bool kTranspose>
__global__ void load_numbered(int* y) {
  struct Matrices {
    alignas(16) uint16_t value[kCount][8][8];
  };
  Matrices& s = shared_memory<Matrices>();
  const int lane = threadIdx.x;
  for (int i = lane; i < kCount * 64; i += 32) {
    s.value[i / 64][i / 8 % 8][i % 8] = static_cast<uint16_t>(100 * (i / 64) + 10 * (i / 8 % 8) + i % 8);
  }
  __syncwarp();
  uint32_t r[kCount];
  load_matrix<kTranspose>(r, &s.value[lane / 8 % kCount][lane % 8][0]);
  for (int i = 0; i < kCount; ++i) {
    y[(i * 32 + lane) * 2] = static_cast<int>(r[i] & 0xffffu);
    y[(i * 32 + lane) * 2 + 1] = static_cast<int>(r[i] >> 16);
  }
}

template <int kCount, bool kTranspose>
void check_load() {
  Array<int> y(kCount * 64);
  launch({.name = "load_numbered", .grid = {}, .threads = 32, .smem_bytes = kCount * 128},
         load_numbered<kCount, kTranspose>, y.data);
  expect("y", y, [](int i) {
    const int matrix = i / 64, lane = i / 2 % 32, row = lane / 4, column = lane % 4 * 2 + i % 2;
    return 100 * matrix + (kTranspose ? 10 * column + row : 10 * row + column);
  });
}

const Case ldmatrix("ldmatrix", [] {
  check_load<1, false>();
  check_load<1, true>();
  check_load<2, false>();
  check_load<2, true>();
  check_load<4, false>();
  check_load<4, true>();
});

__global__ void load_by_half_a_warp(uint32_t* y) {
  uint32_t r[1];
  if (threadIdx.x < 16) load_matrix(r, &shared_memory<uint4>());
  __syncthreads();
  y[threadIdx.x] = r[0];
}

const Fault divergent_ldmatrix("divergent_ldmatrix", [] {
  Array<uint32_t> y(32);
  launch({.name = "load_by_half_a_warp", .grid = {}, .threads = 32, .smem_bytes = 16}, load_by_half_a_warp, y.data);
});

}  // namespace

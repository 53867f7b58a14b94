// Products of matrices in shared memory against plain sums of products.
#include <cmath>
#include <random>

#include "case.h"
#include "common/matmul.cuh"

using namespace seqkern;

namespace {

constexpr int kM = 32, kN = 48, kDepth = 64, kWarpsM = 2, kWarpsN = 2, kThreads = 160;  // one warp without a part

// Operands as they lie in memory, and the product as the operand of another one.
template <typename T, Lie kA, Lie kB>
struct Operands {
  Matrix<T, kA == kPlain ? kM : kDepth, kA == kPlain ? kDepth : kM> a;
  Matrix<T, kB == kPlain ? kDepth : kN, kB == kPlain ? kN : kDepth> b;
  Matrix<T, kM, kN> stored;
};

template <typename T, Lie kA, Lie kB>
__global__ void multiply(const T* a, const T* b, int begin, int end, bool exact, T* d) {
  auto& s = shared_memory<Operands<T, kA, kB>>();
  for (int i = threadIdx.x; i < kM * kDepth; i += kThreads) {
    (kA == kPlain ? s.a[i / kDepth][i % kDepth] : s.a[i % kDepth][i / kDepth]) = a[i];
  }
  for (int i = threadIdx.x; i < kDepth * kN; i += kThreads) {
    (kB == kPlain ? s.b[i / kN][i % kN] : s.b[i % kN][i / kN]) = b[i];
  }
  __syncthreads();
  Product<T, kM, kN, kWarpsM, kWarpsN> product;
  product.clear();
  product.template add<kA, kB>(s.a, s.b, begin, end, exact);
  product.for_each([](int row, int column, auto& sum) { sum += row == column ? 1 : 0; });
  product.store(s.stored);
  __syncthreads();
  for (int i = threadIdx.x; i < kM * kN; i += kThreads) d[i] = s.stored[i / kN][i % kN];
}

// d = 1 + a b over depths [begin, end), to `error` of the sum of |a b|.
template <typename T, Lie kA, Lie kB>
void check(int begin, int end, bool exact, double error) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  ::Array<T> a(kM * kDepth), b(kDepth * kN), d(kM * kN);
  for (T& value : a) value = to<T>(normal(generator));
  for (T& value : b) value = to<T>(normal(generator));
  launch({.name = "multiply", .grid = {}, .threads = kThreads, .smem_bytes = sizeof(Operands<T, kA, kB>)},
         multiply<T, kA, kB>, a.data, b.data, begin, end, exact, d.data);
  for (int row = 0; row < kM; ++row) {
    for (int column = 0; column < kN; ++column) {
      double sum = row == column, size = 1;
      for (int k = begin; k < end; ++k) {
        const double term = to<double>(a[row * kDepth + k]) * to<double>(b[k * kN + column]);
        sum += term, size += std::fabs(term);
      }
      expect("d = 1 + a b", std::fabs(to<double>(d[row * kN + column]) - sum) <= error * size);
    }
  }
}

template <typename T>
void check_all(bool exact, double error) {
  check<T, kPlain, kPlain>(0, kDepth, exact, error);
  check<T, kPlain, kTransposed>(16, 48, exact, error);
  check<T, kTransposed, kPlain>(0, kDepth, exact, error);
  check<T, kTransposed, kTransposed>(0, 32, exact, error);
}

const Case matmul_bfloat16("matmul_bfloat16", [] { check_all<__nv_bfloat16>(true, 0x1p-8); });
const Case matmul_float("matmul_float", [] { check_all<float>(true, 0x1p-21); });
const Case matmul_tf32("matmul_tf32", [] { check_all<float>(false, 0x1p-10); });
const Case matmul_double("matmul_double", [] { check_all<double>(true, 0x1p-50); });

}  // namespace

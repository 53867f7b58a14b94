// common/gemm.h against plain sums: a program that fails with the first product that is wrong.
#include "common/gemm.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace seqkern {
namespace {

int random_below(int n) {
  static uint32_t state = 1;
  state = state * 1664525 + 1013904223;
  return static_cast<int>((state >> 8) % static_cast<uint32_t>(n));
}

// A matrix (rows, columns) whose rows, or whose columns, lie in one piece with a gap after each.
template <class X>
struct Matrix {
  int64_t rows, columns, row, column;
  std::vector<X> data;

  Matrix(int64_t m, int64_t n, bool transposed)
      : rows(m),
        columns(n),
        row(transposed ? 1 : n + 3),
        column(transposed ? m + 5 : 1),
        data(static_cast<size_t>(transposed ? n * column : m * row), narrow<X>(__builtin_nanf(""))) {}

  X& at(int64_t i, int64_t j) { return data[static_cast<size_t>(i * row + j * column)]; }
  double value(int64_t i, int64_t j) { return widen(at(i, j)); }

  // Integers that every type holds, and sums of their products too, or other numbers.
  void fill(bool integers) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        at(i, j) = narrow<X>(integers ? static_cast<float>(random_below(17) - 8)
                                      : static_cast<float>(random_below(1 << 20)) * 0x1p-19f - 1.f);
  }
  void clear_outside(Band band) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        if ((band == Band::kLower && j > i) || (band == Band::kUpper && j < i)) at(i, j) = X{};
  }
};

// Rows of c with their padding, and a row after the last that must stay as it is.
template <class T>
struct Product {
  using S = SumOf<T>;
  static constexpr S kUntouched = -77;
  int64_t row, rows;
  std::vector<S> c;

  Product(int64_t m, int64_t n)
      : row(padded<T>(n)),
        rows(kSame<T, BFloat16> ? padded<T>(m) : m),
        c(static_cast<size_t>((rows + 1) * row), kUntouched) {}
  S at(int64_t i, int64_t j) const { return c[static_cast<size_t>(i * row + j)]; }
  bool kept_its_bounds() const {
    for (int64_t j = 0; j < row; ++j)
      if (at(rows, j) != kUntouched) return false;
    return true;
  }
};

template <class T, class X>
Product<T> multiply(Matrix<X>& a, Matrix<X>& b, Band band, bool twice) {
  const int64_t m = a.rows, n = b.columns, k = a.columns;
  const T nan = narrow<T>(__builtin_nanf(""));
  std::vector<T> left(static_cast<size_t>(left_room<T>(m, k)), nan),
      right(static_cast<size_t>(right_room<T>(k, n)), nan);
  Product<T> c(m, n);
  const Multiplier<T> multiplier;
  const Left<T> packed_a = pack_left<T>(a.data.data(), a.row, a.column, m, k, left.data());
  const Right<T> packed_b = pack_right<T>(b.data.data(), b.row, b.column, k, n, right.data());
  multiply<T>(packed_a, packed_b, c.c.data(), c.row, m, n, k, false, band);
  if (twice) multiply<T>(packed_a, packed_b, c.c.data(), c.row, m, n, k, true, band);
  return c;
}

void require(bool holds, const char* what, int64_t m, int64_t n, int64_t k, int options) {
  if (holds) return;
  std::printf("%s: m = %d, n = %d, k = %d, options %d\n", what, static_cast<int>(m), static_cast<int>(n),
              static_cast<int>(k), options);
  std::exit(1);
}

template <class T, class X>
void test_values() {
  for (const int64_t m : {0, 1, 5, 6, 16, 23, 64})
    for (const int64_t n : {0, 1, 7, 16, 40, 64, 130})
      for (const int64_t k : {0, 1, 9, 32, 47, 64})
        for (int options = 0; options < 24; ++options) {
          const bool twice = options & 4;
          const Band band = static_cast<Band>(options / 8);
          Matrix<X> a(m, k, options & 1), b(k, n, options & 2);
          a.fill(true), b.fill(true), a.clear_outside(band);
          const Product<T> c = multiply<T>(a, b, band, twice);
          require(c.kept_its_bounds(), "bounds", m, n, k, options);
          for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < n; ++j) {
              double sum = 0;
              for (int64_t l = 0; l < k; ++l) sum += a.value(i, l) * b.value(l, j);
              require(c.at(i, j) == (twice ? 2 * sum : sum), "value", m, n, k, options);
            }
        }
}

// A row and a column give the same bits whatever else is multiplied with them.
template <class T, class X>
void test_independence() {
  constexpr int64_t kM = 67, kN = 90, kK = 75;
  Matrix<X> a(kM, kK, false), b(kK, kN, true);
  a.fill(false), b.fill(false);
  const Product<T> whole = multiply<T>(a, b, Band::kFull, false);
  for (int64_t i = 0; i < kM; i += 3)
    for (int64_t j = 0; j < kN; j += 7) {
      const int64_t m = random_below(static_cast<int>(kM - i)) + 1, n = random_below(static_cast<int>(kN - j)) + 1;
      Matrix<X> rows(m, kK, false), columns(kK, n, true);
      for (int64_t l = 0; l < kK; ++l) {
        for (int64_t r = 0; r < m; ++r) rows.at(r, l) = a.at(i + r, l);
        for (int64_t r = 0; r < n; ++r) columns.at(l, r) = b.at(l, j + r);
      }
      const Product<T> part = multiply<T>(rows, columns, Band::kFull, false);
      for (int64_t r = 0; r < m; ++r)
        for (int64_t s = 0; s < n; ++s) require(part.at(r, s) == whole.at(i + r, j + s), "independence", m, n, kK, 0);
    }
}

template <class T, class X>
void test() {
  test_values<T, X>();
  test_independence<T, X>();
}

}  // namespace
}  // namespace seqkern

int main() {
  using namespace seqkern;
  test<float, float>();
  test<float, BFloat16>();
  test<float, Half>();
  test<double, double>();
#if defined(__AVX512F__)
  if (amx()) {
    test<BFloat16, BFloat16>();
    test<BFloat16, float>();
  }
#endif
  return 0;
}

// Memory of the torch-free programs, and how results are compared with what is wanted.
#pragma once

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "common/array.cuh"

namespace seqkern::naive {

using Complex = std::complex<double>;

inline const char* text(DType dtype) {
  const char* names[] = {"fp32", "bf16", "fp16", "fp64"};
  return names[static_cast<int>(dtype)];
}

// Largest relative error of rounding to the type.
inline double epsilon(DType dtype) {
  return dtype == DType::kBFloat16  ? 0x1p-8
         : dtype == DType::kFloat16 ? 0x1p-11
         : dtype == DType::kFloat32 ? 0x1p-24
                                    : 0x1p-53;
}

// What is lost of numbers that are too small for the type.
inline double smallest(DType dtype) {
  return dtype == DType::kFloat16 ? 0x1p-24 : dtype == DType::kFloat64 ? 0 : 0x1p-126;
}

// Memory of exactly this many elements, filled with NaN: address checks see one element too far, results one too few.
struct Buffer {
  std::unique_ptr<unsigned char[]> bytes;
  Array array;
  int64_t size;

  Buffer(DType dtype, int64_t n) : bytes(new unsigned char[n * size_of(dtype)]), array{bytes.get(), dtype}, size(n) {
    for (int64_t i = 0; i < n; ++i) set(i, NAN);
  }
  double operator[](int64_t i) const {
    double value = 0;
    visit(array, [&](const auto* data) { value = to<double>(data[i]); });
    return value;
  }
  void set(int64_t i, double value) {
    visit(array, [&]<typename T>(T* data) { data[i] = to<T>(value); });
  }
  template <typename Draw>
  void fill(Draw&& draw) {
    for (int64_t i = 0; i < size; ++i) set(i, draw(i));
  }
  // Number i of those that are pairs if `pairs`.
  Complex at(int64_t i, bool pairs) const { return pairs ? Complex((*this)[2 * i], (*this)[2 * i + 1]) : (*this)[i]; }
};

// Accumulators, as many bytes as a launch asked for.
inline Buffer workspace(int64_t bytes) {
  return Buffer(DType::kFloat64, (bytes + 7) / 8);
}

// What is wanted of a buffer.
struct Wanted : std::vector<double> {
  using std::vector<double>::vector;
  double largest_term = 0;  // of sums that may cancel

  explicit Wanted(const Buffer& of) : std::vector<double>(of.size) {}
  void add(int64_t i, Complex value, bool pairs) {
    if (!pairs) {
      (*this)[i] += value.real();
    } else {
      (*this)[2 * i] += value.real(), (*this)[2 * i + 1] += value.imag();
    }
  }
  // One more term of a sum.
  void add(int64_t i, double term) {
    (*this)[i] += term;
    largest_term = std::max(largest_term, std::abs(term));
  }
};

// Largest difference, in units of what rounding to the type and sums in `accumulator` allow. Elements that are wanted
// as NaN may hold anything.
inline double difference(const Buffer& got, const Wanted& want, DType accumulator, double terms) {
  double scale = want.largest_term, worst = 0;
  for (const double value : want) scale = std::max(scale, std::isfinite(value) ? std::abs(value) : 0);
  for (int64_t i = 0; i < got.size; ++i) {
    if (std::isnan(want[i]) || got[i] == want[i]) continue;
    const double allowed = 1.5 * epsilon(got.array.dtype) * std::abs(want[i]) + terms * epsilon(accumulator) * scale +
                           smallest(got.array.dtype);
    const double difference = std::abs(got[i] - want[i]) / allowed;
    if (!(difference <= worst)) worst = std::isnan(difference) ? INFINITY : difference;
  }
  return worst;
}

inline bool passes(const std::string& text, const char* name, double difference) {
  if (difference <= 1) return true;
  std::printf("%s: %s is off by %.3g times the tolerance\n", text.c_str(), name, difference);
  return false;
}

}  // namespace seqkern::naive

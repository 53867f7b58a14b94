// Cases of the emulator's own tests: kernels with a known result. The runner runs them by name.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "common/launch.h"

struct Case {
  const char* name;
  void (*run)();  // throws when the result is not as it must be
  const Case* next;

  Case(const char* name_, void (*run_)()) : name(name_), run(run_), next(first) { first = this; }
  static inline const Case* first = nullptr;
};

// A case with a planted bug. What comes of it is for the test to say.
struct Fault : Case {
  using Case::Case;
};

// Arrays of whole vectors: every pointer into them is aligned as a CUDA allocation is.
template <typename T>
struct Array {
  T* data;
  size_t size;

  explicit Array(size_t n, T value = T())
      : data(static_cast<T*>(aligned_alloc(16, (n * sizeof(T) + 15) / 16 * 16))), size(n) {
    for (T& x : *this) x = value;
  }
  ~Array() { free(data); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T& operator[](size_t i) { return data[i]; }
  T* begin() { return data; }
  T* end() { return data + size; }
};

template <typename A, typename Want>
void expect(const char* what, A& got, Want want) {
  for (size_t i = 0; i < got.size; ++i) {
    const auto wanted = want(static_cast<int>(i));
    if (got[i] == wanted) continue;
    throw std::runtime_error(std::string(what) + "[" + std::to_string(i) + "] is " + std::to_string(got[i]) + ", not " +
                             std::to_string(wanted));
  }
}

inline void expect(const char* what, bool holds) {
  if (!holds) throw std::runtime_error(std::string(what) + " does not hold");
}

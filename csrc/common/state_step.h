// How a step of one token cuts the states of heads on a GPU; state_step.cuh is the kernels' side of it.
#pragma once
#include "common/dtype.h"
#include "common/sizes.h"

namespace seqkern {

// The state of a head is a matrix of keys and values, one of which is contiguous. A thread takes 16 bytes of
// accumulators of that one and kStateRows of the other at a time.
constexpr int kStateRows = 4;
constexpr int kStateParts = 32;  // at most

struct StateCut {
  bool value_major;  // keys are the contiguous ones
  int threads;       // of a block
  int parts;         // threads that share the keys of a value
  int width;         // values that a block takes at a time
};

constexpr StateCut cut_state(int64_t keys, int64_t size, bool value_major, DType accumulator, int most_threads) {
  const auto power_of_two = [](int64_t n, int at_most) {
    int result = 1;
    while (result < n && result < at_most) result *= 2;
    return result;
  };
  const int vector = static_cast<int>(16 / size_of(accumulator));
  const int keys_of_thread = value_major ? vector : kStateRows, values_of_thread = value_major ? kStateRows : vector;
  StateCut cut{.value_major = value_major, .threads = 32, .parts = 1, .width = 0};
  cut.parts = power_of_two(ceil_div(keys, keys_of_thread), kStateParts);
  const int lanes = power_of_two(ceil_div(size, values_of_thread), most_threads / cut.parts);
  if (cut.parts * lanes > cut.threads) cut.threads = cut.parts * lanes;
  cut.width = cut.threads / cut.parts * values_of_thread;
  return cut;
}

}  // namespace seqkern

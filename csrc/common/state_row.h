// Which row of a state pool a batch row of a step owns, for CPU kernels; for the device: sequences.cuh.
#pragma once
#include <cstdint>

namespace seqkern {
namespace {

// Of the StepParams of any operator: the row of batch row b, -1: none.
template <class Params>
inline int64_t state_row(const Params& p, int64_t b) {
  if (p.state_indices == nullptr) return b;
  const int64_t row = p.state_indices_is_int64 ? static_cast<const int64_t*>(p.state_indices)[b]
                                               : static_cast<const int32_t*>(p.state_indices)[b];
  return row < p.rows ? row : -1;
}

}  // namespace
}  // namespace seqkern

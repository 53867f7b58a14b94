#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace seqkern {

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                  void* context) noexcept {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t b, int64_t e) { body(b, e, context); });
}

int64_t num_threads() noexcept {
  return torch::stable::get_num_threads();
}

}  // namespace seqkern

// Threads for CPU kernels: torch's pool, reached without torch headers (so it may be called from any instruction set).
#pragma once
#include <cstdint>

namespace seqkern {

// body(begin, end, context) over [begin, end) in pieces of at least `grain`; returns when all are done. noexcept,
// because kernels are compiled without exceptions: an error here, such as memory that has run out, ends the process.
void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                  void* context) noexcept;

// How many threads it may use.
int64_t num_threads() noexcept;

namespace {
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  seqkern::parallel_for(
      begin, end, grain, [](int64_t b, int64_t e, void* context) { (*static_cast<const Body*>(context))(b, e); },
      const_cast<void*>(static_cast<const void*>(&body)));
}
}  // namespace

}  // namespace seqkern

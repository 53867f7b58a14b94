// The copies of common/async.cuh. Until they are waited for, the destination holds NaN, so that a forgotten wait shows.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "common/simt/runtime.h"

namespace seqkern {

template <int kBytes>
void copy_async(void* shared, const void* global, int valid = kBytes, simt::Site where = simt::Site::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if (valid < 0 || valid > kBytes) simt::fail("copy_async of " + std::to_string(valid) + " valid bytes", where);
  if (!simt::in_shared_memory(shared)) simt::fail("copy_async to an address that is not in shared memory", where);
  simt::check_aligned(shared, kBytes, where);
  simt::check_aligned(global, kBytes, where);
  simt::count_read(global, static_cast<size_t>(valid));
  simt::AsyncCopies& copies = simt::async_copies();
  simt::PendingCopy copy{shared, kBytes, copies.group, {}};
  std::memcpy(copy.value, global, static_cast<size_t>(valid));
  std::memset(shared, 0xff, kBytes);
  copies.pending.push_back(copy);
}

inline void commit_copies() {
  ++simt::async_copies().group;
}

template <int kPendingGroups>
void wait_copies() {
  simt::AsyncCopies& copies = simt::async_copies();
  std::erase_if(copies.pending, [&](const simt::PendingCopy& copy) {
    if (copy.group >= copies.group - kPendingGroups) return false;
    std::memcpy(copy.destination, copy.value, static_cast<size_t>(copy.bytes));
    return true;
  });
}

}  // namespace seqkern

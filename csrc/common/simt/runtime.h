// The emulator as device code and launch() see it: the built-in variables, threads that meet, memory, and run().
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <vector>

#include "common/simt/types.h"

// Of the CUDA thread that is running; set at every switch.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace seqkern::simt {

using Site = std::source_location;  // where in the kernel a thread stands

inline constexpr int64_t kMaxSharedBytes = 227 << 10;  // per block, sm_90

// Runs the kernel for every thread of the grid and returns when all have ended; throws std::runtime_error when they
// cannot end or do what CUDA leaves undefined.
void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// --- settings and counters

struct Settings {
  int schedule = 0;           // order of warps, lanes and blocks: 0 ascending, 1 descending, from 2 on seeded random
  int resident_blocks = 132;  // blocks that can wait for each other
};
Settings& settings();  // at first from SEQKERN_SIMT_SCHEDULE and SEQKERN_SIMT_RESIDENT_BLOCKS

struct Counters {
  int64_t launches = 0;
  int64_t bytes_read = 0;  // of global memory, as requested through the primitives of common/
  int64_t bytes_written = 0;
};
Counters& counters();

void count_read(const void* address, size_t bytes);  // shared memory is not counted
void count_write(const void* address, size_t bytes);

// --- what a running thread can do

// Ends the launch with an error that names the kernel and the thread.
[[noreturn]] void fail(const std::string& what, Site where);

unsigned lane();
void* shared_memory(size_t bytes, Site where);  // the block's dynamic shared memory, checked to hold `bytes`
bool in_shared_memory(const void* address);     // dynamic or static
void check_aligned(const void* address, size_t bytes, Site where = Site::current());
void block_barrier(Site where);
void let_others_run(bool first);  // between two looks at a flag; `first` after the first look
void fence();
void after_acquire();  // an atomic load with acquire also sees what fences released

// A copy that was started and has not arrived; 16 bytes at most, as cp.async.
struct PendingCopy {
  void* destination;
  int bytes;
  int group;
  unsigned char value[16];
};
struct AsyncCopies {
  int group = 0;  // of the copies that are started now
  std::vector<PendingCopy> pending;
};
AsyncCopies& async_copies();  // of this thread

// --- threads of a warp that meet

// What the lanes of a mask brought along. A lane that has ended, or is not in the mask, is not there.
template <typename Record>
class Lanes {
 public:
  Lanes(void* const* records, unsigned present) : records_(records), present_(present) {}
  bool has(unsigned lane) const { return present_ >> lane & 1u; }
  Record& operator[](unsigned lane) const { return *static_cast<Record*>(records_[lane]); }

 private:
  void* const* records_;
  unsigned present_;
};

// Waits until all lanes of `mask` have come here; the last one calls `complete` for all of them.
void meet(const char* operation, unsigned mask, Site where, void* record, void (*complete)(void* const*, unsigned),
          bool orders_memory = false);

// The same with typed records; `complete` captures nothing and takes Lanes<Record>.
template <typename Record, typename Complete>
void meet(const char* operation, unsigned mask, Site where, Record& mine, Complete) {
  meet(operation, mask, where, static_cast<void*>(&mine),
       [](void* const* records, unsigned present) { Complete{}(Lanes<Record>(records, present)); });
}

}  // namespace seqkern::simt

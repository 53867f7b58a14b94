// What a running thread can do: meet others, wait, fail, end.
#include <cstring>
#include <stdexcept>

#include "common/simt/sanitizers.h"
#include "common/simt/scheduler.h"

namespace seqkern::simt {
namespace {

Thread& current() {
  return *grid_now->current;
}

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

void wait_as(State state) {
  Thread& t = current();
  t.state = state;
  t.warp->runnable &= ~(1u << t.lane);
  t.fiber.suspend();
}

// Everybody of the mask is here: the last one does the work of all.
void complete_meeting(const Thread& last) {
  Warp& warp = *last.warp;
  const unsigned present = last.mask & warp.live;
  if (last.complete) last.complete(warp.records, present);
  if (last.orders_memory) ++warp.barrier.passed;
  warp.meeting &= ~present;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (present >> lane & 1u) make_runnable(warp.threads[lane]);
  }
}

bool is_complete(const Thread& t) {
  return (t.mask & t.warp->live & ~t.warp->meeting) == 0;
}

// Lanes that expect each other must be at the same operation. (Where only one of two expects the other, the other has
// something else to do first.)
void check_agreement(const Thread& t) {
  for (unsigned lanes = t.warp->meeting; lanes; lanes &= lanes - 1) {
    const Thread& other = t.warp->threads[__builtin_ctz(lanes)];
    const bool expected = (t.mask >> other.lane & 1u) && (other.mask >> t.lane & 1u);
    if (!expected || (other.mask == t.mask && same_place(other.where, t.where))) continue;
    fail(std::string(t.operation) + " with mask " + describe_mask(t.mask) + " in divergent code: lane " +
             std::to_string(other.lane) + " is at " + other.operation + " with mask " + describe_mask(other.mask) +
             ", " + describe(other.where),
         t.where);
  }
}

void end_thread(Thread& t) {
  IgnoreAccesses ignore;
  Warp& warp = *t.warp;
  Block& block = *t.block;
  if (block.at_barrier) {
    fail("a barrier in divergent code: " + std::to_string(block.at_barrier) + " threads wait for a thread that ended" +
             describe_waiting(block),
         t.where);
  }
  t.state = State::kEnded;
  warp.live &= ~(1u << t.lane);
  warp.runnable &= ~(1u << t.lane);
  --block.live;
  for (unsigned lanes = warp.meeting; lanes; lanes &= lanes - 1) {  // they need not wait for this lane any more
    const Thread& other = warp.threads[__builtin_ctz(lanes)];
    if (!(warp.meeting >> other.lane & 1u) || !(other.mask >> t.lane & 1u) || !is_complete(other)) continue;
    complete_meeting(other);
  }
}

}  // namespace

void make_runnable(Thread& t) {
  t.state = State::kRunnable;
  t.warp->runnable |= 1u << t.lane;
}

void thread_main() {
  acquire(&grid_now->started);
  grid_now->body();
  release(&grid_now->ended);
  end_thread(current());
  current().fiber.suspend(true);
}

void fail(const std::string& what, Site where) {
  if (!grid_now || !grid_now->current) throw std::runtime_error("seqkern: device code outside a kernel: " + what);
  Thread& t = current();
  grid_now->error =
      what + " (block " + describe(t.block->index) + ", thread " + describe(t.index) + ", " + describe(where) + ")";
  t.fiber.suspend(true);
  __builtin_unreachable();
}

unsigned lane() {
  return current().lane;
}

AsyncCopies& async_copies() {
  return current().copies;
}

void meet(const char* operation, unsigned mask, Site where, void* record, void (*complete)(void* const*, unsigned),
          bool orders_memory) {
  IgnoreAccesses ignore;
  Thread& t = current();
  Warp& warp = *t.warp;
  t.operation = operation;
  t.mask = mask;
  t.where = where;
  t.complete = complete;
  t.orders_memory = orders_memory;
  if (!(mask >> t.lane & 1u)) {
    fail(std::string(operation) + " with mask " + describe_mask(mask) + ", which leaves out its own lane " +
             std::to_string(t.lane),
         where);
  }
  check_agreement(t);
  char* order = warp.barrier.now();
  if (orders_memory) release(order);
  warp.records[t.lane] = record;
  warp.meeting |= 1u << t.lane;
  if (is_complete(t)) {
    complete_meeting(t);
  } else {
    wait_as(State::kMeeting);
  }
  if (!orders_memory) return;
  acquire(order);
  if (mask != 0xffffffffu) acquire(warp.barrier.now());  // other lanes may have met, and changed objects, in between
}

void block_barrier(Site where) {
  IgnoreAccesses ignore;
  Thread& t = current();
  Block& block = *t.block;
  const size_t ended = block.threads.size() - block.live;
  if (ended) {
    fail("__syncthreads in divergent code: " + std::to_string(ended) + " threads of the block have ended", where);
  }
  for (const Thread& other : block.threads) {
    if (other.state != State::kBarrier) continue;
    if (!same_place(other.where, where)) {
      fail("__syncthreads in divergent code: thread " + describe(other.index) + " is at the one of " +
               describe(other.where),
           where);
    }
    break;
  }
  t.where = where;
  char* order = block.barrier.now();
  release(order);
  if (++block.at_barrier < block.live) {
    wait_as(State::kBarrier);
  } else {
    block.at_barrier = 0;
    ++block.barrier.passed;
    for (Thread& other : block.threads) {
      if (other.state == State::kBarrier) make_runnable(other);
    }
  }
  acquire(order);
}

void let_others_run(bool first) {
  IgnoreAccesses ignore;
  Thread& t = current();
  t.warp->spinning |= 1u << t.lane;
  grid_now->spins_in_vain = !first;
  wait_as(State::kSpinning);
}

// ThreadSanitizer knows no fences. What came before a fence happens before what follows any later fence or acquire.
static char fences;

void fence() {
  release(&fences);
  acquire(&fences);
}

void after_acquire() {
  acquire(&fences);
}

// --- memory

void* shared_memory(size_t bytes, Site where) {
  if (bytes > grid_now->shared_bytes) {
    fail("shared_memory() of " + std::to_string(bytes) +
             " bytes, where the launch gave smem_bytes = " + std::to_string(grid_now->shared_bytes),
         where);
  }
  return current().block->shared;
}

bool in_shared_memory(const void* address) {
  const char* byte = static_cast<const char*>(address);
  const char* dynamic = current().block->shared;
  return (byte >= dynamic && byte < dynamic + grid_now->shared_bytes) ||
         (byte >= static_shared_begin() && byte < static_shared_begin() + static_shared_bytes());
}

void check_aligned(const void* address, size_t bytes, Site where) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  fail("a misaligned access: the address must be a multiple of " + std::to_string(bytes) + " bytes", where);
}

void count_read(const void* address, size_t bytes) {
  if (!in_shared_memory(address)) counters().bytes_read += static_cast<int64_t>(bytes);
}

void count_write(const void* address, size_t bytes) {
  if (!in_shared_memory(address)) counters().bytes_written += static_cast<int64_t>(bytes);
}

}  // namespace seqkern::simt

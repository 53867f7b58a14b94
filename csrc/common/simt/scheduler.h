// The state of a launch. Inside the emulator only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/simt/fiber.h"
#include "common/simt/runtime.h"

namespace seqkern::simt {

inline constexpr unsigned kLanes = 32;

enum class State { kRunnable, kMeeting, kBarrier, kSpinning, kEnded };

struct Warp;
struct Block;

struct Thread {
  Fiber fiber;
  uint3 index;
  unsigned lane;
  Warp* warp;
  Block* block;
  State state;
  Site where;             // it waits, at a barrier or to meet
  const char* operation;  // the arguments of meet()
  unsigned mask;
  void (*complete)(void* const*, unsigned);
  bool orders_memory;
  AsyncCopies copies;
};

// Barriers alternate between two objects for ThreadSanitizer, so that a thread that is ahead, at the next barrier, does
// not order those that have yet to leave this one.
struct Barrier {
  unsigned passed = 0;
  char order[2] = {};
  char* now() { return &order[passed % 2]; }
};

struct Warp {
  Thread* threads = nullptr;
  unsigned live = 0, runnable = 0, meeting = 0, spinning = 0;  // lanes, as bits
  void* records[kLanes] = {};                                  // of those that are meeting
  Barrier barrier;                                             // __syncwarp
};

struct Block {
  uint3 index;
  bool started = false;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned live = 0, at_barrier = 0;  // threads
  Barrier barrier;                    // __syncthreads
  char* shared = nullptr;
  std::unique_ptr<char[]> static_shared;  // while another block runs

  Block() = default;
  ~Block();
  bool ended() const { return started && live == 0; }
};

// Linear congruential: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  unsigned below(unsigned n) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<unsigned>((state_ >> 33) % n);
  }

 private:
  uint64_t state_;
};

struct Grid {
  const char* kernel;
  dim3 blocks, threads;
  size_t shared_bytes;
  const std::function<void()>& body;
  int schedule;
  Random random;
  Thread* current = nullptr;
  Block* loaded = nullptr;     // whose static shared memory is in place
  bool spins_in_vain = false;  // the thread that ran last looked at its flag once more and found no change
  std::string error;
  char started = 0, ended = 0;  // for ThreadSanitizer: what precedes the launch, its threads, what follows
};

extern Grid* grid_now;  // null outside a launch

char* static_shared_begin();
size_t static_shared_bytes();

void make_runnable(Thread& thread);
void thread_main();  // what a fiber runs

std::string describe(const uint3& index);
std::string describe(const Site& where);
std::string describe_mask(unsigned lanes);
std::string describe_waiting(const Block& block);  // one line per group of lanes that wait for the same thing

}  // namespace seqkern::simt

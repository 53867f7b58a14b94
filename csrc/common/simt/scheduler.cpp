// Which thread of which block runs next.
#include "common/simt/scheduler.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>
#include <stdexcept>

#include "common/simt/sanitizers.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// The ends of the section of static shared memory, if any kernel has some.
extern "C" char __start_seqkern_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_seqkern_shared[] __attribute__((weak, visibility("hidden")));

namespace seqkern::simt {

Grid* grid_now = nullptr;

char* static_shared_begin() {
  return __start_seqkern_shared;
}
size_t static_shared_bytes() {
  return static_cast<size_t>(__stop_seqkern_shared - __start_seqkern_shared);
}

Block::~Block() {
  std::free(shared);
}

namespace {

constexpr size_t kSharedAlignment = 128;
constexpr size_t kSpareFibers = 1000;
constexpr unsigned kOvertaking = 64;  // in a seeded order a warp stops early once in so many steps

std::mutex one_launch_at_a_time;
std::deque<Fiber> spare_fibers;  // of threads that have ended, oldest first

[[noreturn]] void raise(const std::string& what) {
  throw std::runtime_error("seqkern: " + std::string(grid_now->kernel) + " in the emulator: " + what);
}

void allocate_shared_memory(Block& block, size_t bytes) {
  void* memory = nullptr;
  // Exactly as many bytes as asked for, so that AddressSanitizer sees the first one behind them.
  if (posix_memalign(&memory, kSharedAlignment, std::max<size_t>(bytes, 1))) throw std::bad_alloc();
  block.shared = static_cast<char*>(memory);
  std::memset(block.shared, 0xff, bytes);  // NaN
  block.static_shared = std::make_unique<char[]>(static_shared_bytes());
  std::memset(block.static_shared.get(), 0xff, static_shared_bytes());
}

// To ThreadSanitizer, what runs on a fiber follows what ran there before. So it gets one that was used long ago: races
// between blocks that are near each other are found.
Fiber take_fiber() {
  if (spare_fibers.size() < (has_thread_sanitizer() ? kSpareFibers : 1)) return Fiber();
  Fiber oldest = std::move(spare_fibers.front());
  spare_fibers.pop_front();
  return oldest;
}

std::unique_ptr<Block> new_block(size_t number) {
  const dim3 blocks = grid_now->blocks;
  auto block = std::make_unique<Block>();
  block->index = {static_cast<unsigned>(number % blocks.x), static_cast<unsigned>(number / blocks.x % blocks.y),
                  static_cast<unsigned>(number / (static_cast<size_t>(blocks.x) * blocks.y))};
  return block;
}

void start_block(Block& block) {
  const dim3 size = grid_now->threads;
  const unsigned threads = size.x * size.y * size.z;
  allocate_shared_memory(block, grid_now->shared_bytes);
  block.threads.resize(threads);
  block.warps.resize((threads + kLanes - 1) / kLanes);
  block.live = threads;
  for (unsigned i = 0; i < threads; ++i) {
    Thread& t = block.threads[i];
    Warp& warp = block.warps[i / kLanes];
    t.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    t.lane = i % kLanes;
    t.warp = &warp;
    t.block = &block;
    if (t.lane == 0) warp.threads = &t;
    warp.live |= 1u << t.lane;
    make_runnable(t);
    t.fiber = take_fiber();
    t.fiber.start(&thread_main);
  }
  block.started = true;
}

void keep_fibers(Block& block) {
  for (Thread& t : block.threads) spare_fibers.push_back(std::move(t.fiber));
  while (spare_fibers.size() > 2 * kSpareFibers) spare_fibers.pop_front();
}

// Makes the block the one whose variables the threads see.
void load_block(Block& block) {
  blockIdx = block.index;
  Block*& loaded = grid_now->loaded;
  if (loaded == &block || static_shared_bytes() == 0) return;
  if (loaded) std::memcpy(loaded->static_shared.get(), static_shared_begin(), static_shared_bytes());
  std::memcpy(static_shared_begin(), block.static_shared.get(), static_shared_bytes());
  loaded = &block;
}

void run_thread(Thread& t) {
  grid_now->current = &t;
  grid_now->spins_in_vain = false;
  threadIdx = t.index;
  t.fiber.resume();
  grid_now->current = nullptr;
  if (!grid_now->error.empty()) raise(grid_now->error);
}

unsigned next_lane(unsigned lanes) {
  const unsigned lowest = static_cast<unsigned>(__builtin_ctz(lanes));
  if (grid_now->schedule == 0) return lowest;
  if (grid_now->schedule == 1) return kLanes - 1 - static_cast<unsigned>(__builtin_clz(lanes));
  const unsigned from = grid_now->random.below(kLanes), later = lanes >> from << from;
  return later ? static_cast<unsigned>(__builtin_ctz(later)) : lowest;
}

template <typename T>
void put_in_order(std::vector<T*>& items) {
  if (grid_now->schedule == 1) std::reverse(items.begin(), items.end());
  if (grid_now->schedule < 2) return;
  for (size_t i = items.size(); i > 1; --i) {
    std::swap(items[i - 1], items[grid_now->random.below(static_cast<unsigned>(i))]);
  }
}

// Lets every runnable lane run, again and again, and then those that spin look at their flag. Returns whether any of
// them went on.
bool run_warp(Warp& warp) {
  bool went_on = false;
  while (warp.runnable) {
    run_thread(warp.threads[next_lane(warp.runnable)]);
    went_on = true;
    if (grid_now->schedule >= 2 && grid_now->random.below(kOvertaking) == 0) break;
  }
  for (unsigned waiting = warp.spinning; waiting; waiting &= waiting - 1) {
    Thread& t = warp.threads[__builtin_ctz(waiting)];
    warp.spinning &= ~(1u << t.lane);
    make_runnable(t);
    run_thread(t);
    went_on |= !grid_now->spins_in_vain;
  }
  return went_on;
}

// Runs the block until none of its threads can go on; returns whether any of them did. A warp runs as far as it can
// before the next one has its turn: turns of one step each would hide a missing barrier.
bool run_block(Block& block) {
  if (!block.started) start_block(block);
  load_block(block);
  std::vector<Warp*> order;
  bool went_on = false;
  for (bool again = true; again;) {
    again = false;
    order.clear();
    for (Warp& warp : block.warps) order.push_back(&warp);
    put_in_order(order);
    for (Warp* warp : order) again |= run_warp(*warp);
    went_on |= again;
  }
  return went_on;
}

// Blocks start in the order of their index, as many as are resident. The ascending order starts the next one only when
// those before it wait for it, which saves memory.
void run_blocks() {
  const size_t total = static_cast<size_t>(grid_now->blocks.x) * grid_now->blocks.y * grid_now->blocks.z;
  const size_t limit = static_cast<size_t>(std::max(settings().resident_blocks, 1));
  size_t started = 0, window = grid_now->schedule == 0 ? 1 : limit;
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<Block*> order;
  while (started < total || !resident.empty()) {
    while (resident.size() < window && started < total) resident.push_back(new_block(started++));
    order.clear();
    for (const auto& block : resident) order.push_back(block.get());
    put_in_order(order);
    bool went_on = false;
    for (Block* block : order) {
      went_on |= run_block(*block);
      if (!block->ended()) continue;
      if (grid_now->loaded == block) grid_now->loaded = nullptr;
      keep_fibers(*block);
      const auto place = std::find_if(resident.begin(), resident.end(), [&](auto& b) { return b.get() == block; });
      resident.erase(place);
    }
    if (went_on) continue;
    if (window < limit && started < total) {
      ++window;
      continue;
    }
    std::string what = "deadlock, no thread can go on";
    if (started < total) {
      what += " (" + std::to_string(resident.size()) + " of " + std::to_string(total) +
              " blocks are resident; the others start when one of these has ended)";
    }
    for (const auto& block : resident) what += describe_waiting(*block);
    raise(what);
  }
}

}  // namespace

void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  IgnoreAccesses ignore;
  const int schedule = settings().schedule;
  Grid now{kernel,  grid,  block, shared_bytes, body, schedule, Random(static_cast<uint64_t>(schedule)), nullptr,
           nullptr, false, {}};
  struct Announcement {
    explicit Announcement(Grid& grid) { grid_now = &grid; }
    ~Announcement() { grid_now = nullptr; }
  } announcement(now);
  gridDim = grid;
  blockDim = block;
  ++counters().launches;
  release(&now.started);
  run_blocks();
  acquire(&now.ended);
}

}  // namespace seqkern::simt

#include "common/team.h"

#include <atomic>
#include <chrono>

#include "common/parallel.h"

namespace seqkern {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kGather = std::chrono::microseconds(60);  // how long the first member waits for others
constexpr auto kSpin = std::chrono::microseconds(20);    // how long a member waits before it sleeps
constexpr int kPausesPerLook = 32;                       // at the clock

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Whether done() became true in time.
template <class Done>
bool spin(Clock::duration time, const Done& done) {
  const Clock::time_point end = Clock::now() + time;
  do {
    for (int i = 0; i < kPausesPerLook; ++i, pause())
      if (done()) return true;
  } while (Clock::now() < end);
  return false;
}

// Who changes a word that others wait for does so by a sequentially consistent store: before notify_all() looks whether
// anybody sleeps, the store must have arrived, or who falls asleep meanwhile sleeps for ever.

// Waits while `word` is `old`: at first busily, for those who come soon, and then asleep, which leaves the processor to
// who keeps the others from coming.
void wait_while(const std::atomic<uint32_t>& word, uint32_t old) {
  const auto changed = [&] { return word.load(std::memory_order_acquire) != old; };
  if (!spin(kSpin, changed)) word.wait(old, std::memory_order_acquire);
}

}  // namespace

class Team {
 public:
  // False: the team has closed, and works without this thread. `expected`: how many will come, if all do.
  bool join(uint32_t expected, Member& member) {
    uint32_t count = count_.load(std::memory_order_relaxed);
    do
      if (count & kClosed) return false;
    while (!count_.compare_exchange_weak(count, count + 1, std::memory_order_acq_rel));
    if (count == 0) {
      spin(kGather, [&] { return count_.load(std::memory_order_relaxed) == expected; });
      size_.store(count_.fetch_or(kClosed, std::memory_order_acq_rel));
      size_.notify_all();
    } else {
      wait_while(size_, 0);
    }
    member = {count, size_.load(std::memory_order_acquire), this};
    return true;
  }

  void wait() {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_.load(std::memory_order_relaxed)) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1);
      round_.notify_all();
    } else {
      wait_while(round_, round);
    }
  }

 private:
  static constexpr uint32_t kClosed = 1u << 31;
  static constexpr int kLine = 64;  // bytes that processors hand to each other at a time

  std::atomic<uint32_t> count_{0};                   // of members, and kClosed
  std::atomic<uint32_t> size_{0};                    // of the team, when closed
  alignas(kLine) std::atomic<uint32_t> arrived_{0};  // of this round
  alignas(kLine) std::atomic<uint32_t> round_{0};
};

void Member::wait() const noexcept {
  if (size > 1) team->wait();
}

void in_team(int64_t most, void (*body)(const Member&, void*), void* context) noexcept {
  Team team;
  parallel_for(0, most, 1, [&](int64_t begin, int64_t end) {
    const int64_t expected = (most + end - begin - 1) / (end - begin);  // a thread may have got more than one part
    Member member;
    if (team.join(static_cast<uint32_t>(expected), member)) body(member, context);
  });
}

}  // namespace seqkern

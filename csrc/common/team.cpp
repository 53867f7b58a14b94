#include "common/team.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

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

// A word that one member changes and others wait for. Not std::atomic's wait(), which yields before it sleeps: on a
// busy machine that gives a whole time slice away.
class Signal {
 public:
  uint32_t value() const { return word_.load(std::memory_order_acquire); }

  // The store comes before the look at the sleepers, as their count comes before the kernel's look at the word: one of
  // both sees the other.
  void set(uint32_t value) {
    word_.store(value);
    if (sleepers_.load() > 0) futex(FUTEX_WAKE_PRIVATE, INT32_MAX);
  }
  // Returns when the value is not `old`: waits busily at first, for those who come soon, and then asleep, which leaves
  // the processor to who keeps the others from coming.
  void wait_while(uint32_t old) {
    if (spin(kSpin, [&] { return value() != old; })) return;
    sleepers_.fetch_add(1);
    while (value() == old) futex(FUTEX_WAIT_PRIVATE, old);
    sleepers_.fetch_sub(1);
  }

 private:
  void futex(int operation, uint32_t argument) {
    static_assert(sizeof word_ == sizeof(uint32_t));
    syscall(SYS_futex, &word_, operation, argument, nullptr, nullptr, 0);
  }

  std::atomic<uint32_t> word_{0}, sleepers_{0};
};

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
      size_.set(count_.fetch_or(kClosed, std::memory_order_acq_rel));
    } else {
      size_.wait_while(0);
    }
    member = {count, size_.value(), this};
    return true;
  }

  void wait() {
    const uint32_t round = round_.value();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_.value()) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.set(round + 1);
    } else {
      round_.wait_while(round);
    }
  }

 private:
  static constexpr uint32_t kClosed = 1u << 31;
  static constexpr int kLine = 64;  // bytes that processors hand to each other at a time

  std::atomic<uint32_t> count_{0};                   // of members, and kClosed
  Signal size_;                                      // of the team, when closed
  alignas(kLine) std::atomic<uint32_t> arrived_{0};  // of this round
  alignas(kLine) Signal round_;
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

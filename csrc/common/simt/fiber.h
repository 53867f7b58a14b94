// Fibers: many call stacks on one OS thread. The scheduler resumes one, which runs until it suspends itself.
#pragma once

#include <cstddef>
#include <memory>

namespace seqkern::simt {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(Fiber&&) noexcept;
  Fiber& operator=(Fiber&&) noexcept;

  void start(void (*entry)());  // the next resume() calls entry, which must not return; what ran here before is dropped
  void resume();                // from the scheduler, until the fiber suspends itself
  void suspend(bool for_good = false);  // from the fiber, back to the scheduler

 private:
  struct Stack;
  std::unique_ptr<Stack> stack_;
};

}  // namespace seqkern::simt

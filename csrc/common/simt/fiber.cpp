#include "common/simt/fiber.h"

#include <cstdint>
#include <cstdlib>
#include <new>

#include "common/simt/sanitizers.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace seqkern::simt {
namespace {

// The build refuses kernels with frames that would not fit (tools/emulator.py). Instrumented frames are larger. A power
// of two would put all stacks on the same cache sets.
size_t stack_bytes() {
  return (has_thread_sanitizer() || has_address_sanitizer() ? 256 << 10 : 64 << 10) + 576;
}

#if defined(__x86_64__)

// Only what a function call must preserve is saved: a switch costs a few nanoseconds.
extern "C" void seqkern_simt_switch(void** save, void* to);
asm(R"(
.text
.type seqkern_simt_switch, @function
seqkern_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size seqkern_simt_switch, . - seqkern_simt_switch
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // where entry would return to
    *--top = reinterpret_cast<void*>(entry);
    for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
    stack_pointer = top;
  }
  static void change(Context& from, Context& to) { seqkern_simt_switch(&from.stack_pointer, to.stack_pointer); }
};

#else

struct Context {
  ucontext_t state;

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = bytes;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
};

#endif

struct Scheduler {
  Context context;
  void* tsan_fiber = nullptr;
  const void* stack = nullptr;  // as AddressSanitizer knows it
  size_t stack_size = 0;
} scheduler;

void (*entry_of_new_fiber)() = nullptr;

void first_steps() {
  if (has_address_sanitizer()) __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_size);
  entry_of_new_fiber();
  std::abort();
}

}  // namespace

struct Fiber::Stack {
  size_t bytes = stack_bytes();
  char* memory = static_cast<char*>(std::malloc(bytes));
  Context context;
  void* tsan_fiber = has_thread_sanitizer() ? __tsan_create_fiber(0) : nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's

  Stack() {
    if (!memory) throw std::bad_alloc();
  }
  ~Stack() {
    std::free(memory);
    if (tsan_fiber) __tsan_destroy_fiber(tsan_fiber);
  }
};

Fiber::Fiber() = default;
Fiber::~Fiber() = default;
Fiber::Fiber(Fiber&&) noexcept = default;
Fiber& Fiber::operator=(Fiber&&) noexcept = default;

void Fiber::start(void (*entry)()) {
  if (!stack_) stack_ = std::make_unique<Stack>();
  Stack& s = *stack_;
  if (has_address_sanitizer()) __asan_unpoison_memory_region(s.memory, s.bytes);
  entry_of_new_fiber = entry;
  s.context.prepare(s.memory, s.bytes & ~size_t{15}, &first_steps);
}

void Fiber::resume() {
  Stack& s = *stack_;
  void* fake_stack = nullptr;
  if (has_thread_sanitizer()) {
    scheduler.tsan_fiber = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(s.tsan_fiber, 1);  // 1: a switch orders nothing
  }
  if (has_address_sanitizer()) __sanitizer_start_switch_fiber(&fake_stack, s.memory, s.bytes);
  Context::change(scheduler.context, s.context);
  if (has_address_sanitizer()) __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void Fiber::suspend(bool for_good) {
  Stack& s = *stack_;
  if (has_thread_sanitizer()) __tsan_switch_to_fiber(scheduler.tsan_fiber, 1);
  if (has_address_sanitizer()) {
    __sanitizer_start_switch_fiber(for_good ? nullptr : &s.fake_stack, scheduler.stack, scheduler.stack_size);
  }
  Context::change(s.context, scheduler.context);
  if (has_address_sanitizer()) __sanitizer_finish_switch_fiber(s.fake_stack, &scheduler.stack, &scheduler.stack_size);
}

}  // namespace seqkern::simt

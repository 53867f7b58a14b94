// What AddressSanitizer and ThreadSanitizer must be told about fibers. Their functions are weak: the emulator itself is
// compiled once, without instrumentation, and finds out when it runs whether the kernels were built with one of them.
#pragma once

#include <cstddef>

extern "C" {
void* __tsan_get_current_fiber() __attribute__((weak));
void* __tsan_create_fiber(unsigned flags) __attribute__((weak));
void __tsan_destroy_fiber(void* fiber) __attribute__((weak));
void __tsan_switch_to_fiber(void* fiber, unsigned flags) __attribute__((weak));
void __tsan_acquire(void* object) __attribute__((weak));
void __tsan_release(void* object) __attribute__((weak));
void AnnotateIgnoreReadsBegin(const char* file, int line) __attribute__((weak));
void AnnotateIgnoreReadsEnd(const char* file, int line) __attribute__((weak));
void AnnotateIgnoreWritesBegin(const char* file, int line) __attribute__((weak));
void AnnotateIgnoreWritesEnd(const char* file, int line) __attribute__((weak));

void __asan_unpoison_memory_region(const volatile void* address, size_t bytes) __attribute__((weak));
void __sanitizer_start_switch_fiber(void** saved, const void* bottom, size_t bytes) __attribute__((weak));
void __sanitizer_finish_switch_fiber(void* saved, const void** bottom, size_t* bytes) __attribute__((weak));
}

namespace seqkern::simt {

inline bool has_thread_sanitizer() {
  return __tsan_create_fiber != nullptr;
}
inline bool has_address_sanitizer() {
  return __asan_unpoison_memory_region != nullptr;
}

// What released an object happens before what acquires it.
inline void release(void* object) {
  if (has_thread_sanitizer()) __tsan_release(object);
}
inline void acquire(void* object) {
  if (has_thread_sanitizer()) __tsan_acquire(object);
}

// While it lives, memory that the emulator touches is not the kernel's doing.
class IgnoreAccesses {
 public:
  IgnoreAccesses() {
    if (!has_thread_sanitizer()) return;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~IgnoreAccesses() {
    if (!has_thread_sanitizer()) return;
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  IgnoreAccesses(const IgnoreAccesses&) = delete;
  IgnoreAccesses& operator=(const IgnoreAccesses&) = delete;
};

}  // namespace seqkern::simt

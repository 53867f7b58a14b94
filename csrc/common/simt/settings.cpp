// Settings and counters, and the C functions by which Python reaches them.
#include <cstdlib>

#include "common/simt/runtime.h"

namespace seqkern::simt {
namespace {

int from_environment(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? std::atoi(value) : otherwise;
}

}  // namespace

Settings& settings() {
  static Settings now = [] {
    Settings s;
    s.schedule = from_environment("SEQKERN_SIMT_SCHEDULE", s.schedule);
    s.resident_blocks = from_environment("SEQKERN_SIMT_RESIDENT_BLOCKS", s.resident_blocks);
    return s;
  }();
  return now;
}

Counters& counters() {
  static Counters now;
  return now;
}

}  // namespace seqkern::simt

#define SEQKERN_SIMT_API extern "C" __attribute__((visibility("default")))

SEQKERN_SIMT_API void seqkern_simt_set_schedule(int schedule) {
  seqkern::simt::settings().schedule = schedule;
}
SEQKERN_SIMT_API void seqkern_simt_set_resident_blocks(int n) {
  seqkern::simt::settings().resident_blocks = n;
}
SEQKERN_SIMT_API int64_t seqkern_simt_launches() {
  return seqkern::simt::counters().launches;
}
SEQKERN_SIMT_API int64_t seqkern_simt_bytes_read() {
  return seqkern::simt::counters().bytes_read;
}
SEQKERN_SIMT_API int64_t seqkern_simt_bytes_written() {
  return seqkern::simt::counters().bytes_written;
}
SEQKERN_SIMT_API void seqkern_simt_reset() {
  seqkern::simt::counters() = {};
}

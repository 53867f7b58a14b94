// Threads that go through one loop in step, for CPU kernels whose iterations are too short for a parallel region each.
#pragma once
#include <cstdint>

namespace seqkern {

class Team;

struct Member {
  int64_t index = 0, size = 1;
  Team* team = nullptr;  // nobody else without one

  // Returns when all members have come here; what they wrote before is seen after.
  void wait() const noexcept;
};

// body(member, context) on threads of torch's pool, at the same time on all: `most` of them, or those that came within
// a short while, so that a pool which is busy or smaller costs time and nothing else. Returns when all are done.
void in_team(int64_t most, void (*body)(const Member&, void*), void* context) noexcept;

namespace {
template <class Body>
void in_team(int64_t most, const Body& body) {
  seqkern::in_team(
      most, [](const Member& member, void* context) { (*static_cast<const Body*>(context))(member); },
      const_cast<void*>(static_cast<const void*>(&body)));
}
}  // namespace

}  // namespace seqkern

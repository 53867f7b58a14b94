// The words of error texts.
#include <algorithm>
#include <cstdio>
#include <utility>

#include "common/simt/scheduler.h"

namespace seqkern::simt {
namespace {

std::string what_it_waits_for(const Thread& t) {
  switch (t.state) {
    case State::kMeeting:
      return std::string(t.operation) + " with mask " + describe_mask(t.mask) + " at " + describe(t.where);
    case State::kBarrier:
      return "__syncthreads at " + describe(t.where);
    case State::kSpinning:
      return "a flag (spin_until)";
    case State::kRunnable:
      return "their turn";
    case State::kEnded:
      break;
  }
  return "nothing";
}

}  // namespace

std::string describe(const uint3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string describe(const Site& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

std::string describe_mask(unsigned lanes) {
  char digits[9];
  std::snprintf(digits, sizeof digits, "%08x", lanes);
  return digits;
}

std::string describe_waiting(const Block& block) {
  std::string lines;
  for (const Warp& warp : block.warps) {
    std::vector<std::pair<std::string, unsigned>> groups;
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (!(warp.live >> lane & 1u)) continue;
      const std::string reason = what_it_waits_for(warp.threads[lane]);
      auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& g) { return g.first == reason; });
      if (group == groups.end()) group = groups.insert(group, {reason, 0u});
      group->second |= 1u << lane;
    }
    for (const auto& [reason, lanes] : groups) {
      lines += "\n  block " + describe(block.index) + " warp " + std::to_string(&warp - block.warps.data()) +
               " lanes " + describe_mask(lanes) + " wait for " + reason;
    }
  }
  return lines;
}

}  // namespace seqkern::simt

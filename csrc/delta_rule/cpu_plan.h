// How the CPU kernels cut the work, and the memory that they need. Pure functions of the call and of the number of
// threads.
//
// A unit of work is a run and a value head, or a part of that head's values: columns of its state, which know nothing
// of each other. Time is not cut: the state goes through a run from its first chunk to its last.
#pragma once
#include "common/chunk_plan.h"
#include "delta_rule/params.h"

namespace seqkern::delta_rule {
namespace {  // kernels are compiled once per instruction set, which must share no code

inline int64_t cpu_fwd_workspace_bytes(const FwdParams&) {
  return 0;
}

// ---- backward: a unit of work is a run and a part of a key head, which is some of its value heads, or, where there
// are threads enough and results may depend on their number, some values of one of them.

inline int64_t bwd_values_of_part(const Inputs& in) {
  const bool cut = in.split_time && num_threads() >= 2 * in.num_runs * in.value_heads;
  return cut ? values_of_part(in) : at_least(1, in.size);
}
inline int64_t bwd_value_parts(const Inputs& in) {
  return at_least(1, ceil_div(in.size, bwd_values_of_part(in)));
}

// The workspace, in accumulators: what parts are to be summed of, in order.
struct BwdWorkspace {
  int64_t parts;    // of a key head
  int64_t keys;     // (parts, 3, B L, H, K): dq, dk, derase
  int64_t numbers;  // (value parts, 2, B L, HV): dbeta and ddecay
  int64_t decays;   // (value parts, B L, HV, K): ddecay per key

  explicit BwdWorkspace(const Inputs& in) {
    const int64_t tokens = in.sequences.batch * in.sequences.length, values = bwd_value_parts(in);
    parts = parts_of_group(in) * values;
    keys = parts == 1 ? 0 : parts * 3 * tokens * in.heads * in.keys;
    numbers = values == 1 ? 0 : values * 2 * tokens * in.value_heads;
    decays = values == 1 || in.form != Decay::kKey ? 0 : values * tokens * in.value_heads * in.keys;
  }
};
inline int64_t cpu_bwd_workspace_bytes(const BwdParams& p) {
  const BwdWorkspace w(p);
  return (w.keys + w.numbers + w.decays) * size_of(p.accumulator);
}

}  // namespace
}  // namespace seqkern::delta_rule

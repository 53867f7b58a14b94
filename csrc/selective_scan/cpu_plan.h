// How the CPU kernels cut the work, and the memory that the backward sums in. Pure functions of the call.
//
// Vectors hold neighbouring channels and walk through time, which is not split: few channels keep few threads busy.
#pragma once
#include "selective_scan/params.h"

namespace seqkern::selective_scan {
namespace {  // kernels are compiled once per instruction set, which must share no code

constexpr int64_t greatest_common_divisor(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t rest = a % b;
    a = b, b = rest;
  }
  return a;
}

// Channels of one piece are neighbours that share their groups of B and C.
constexpr int64_t channels_of_piece(const Inputs& in) {
  const int64_t of_B = in.B.constant() ? in.channels : in.channels / in.B.groups;
  const int64_t of_C = in.C.constant() ? in.channels : in.channels / in.C.groups;
  return greatest_common_divisor(of_B, of_C);
}

// The backward sums variable dB and dC over blocks of at most this many channels of a piece, and then over the blocks
// in order: the result does not depend on threads.
constexpr int64_t kBlock = 64;

constexpr int64_t blocks_of_piece(const Inputs& in) {
  return (channels_of_piece(in) + kBlock - 1) / kBlock;
}

constexpr int64_t num_blocks(const Inputs& in) {
  return in.channels == 0 ? 0 : in.channels / channels_of_piece(in) * blocks_of_piece(in);
}

// It sums gradients per channel over slabs of runs, and then over the slabs in order.
constexpr int64_t kMaxSlabs = 32;

constexpr int64_t num_slabs(const Inputs& in) {
  return in.num_runs < kMaxSlabs ? in.num_runs : kMaxSlabs;
}

// Sums of one channel: dA, constant dB and dC (N * parts each), dD and ddelta_bias.
constexpr int64_t sums_of_channel(const Inputs& in) {
  const int64_t per_state = 1 + (in.B.constant() ? 1 : 0) + (in.C.constant() ? 1 : 0);
  return per_state * in.states * in.parts() + 2;
}

constexpr int64_t cpu_fwd_workspace_bytes(const FwdParams&) {
  return 0;
}

// In accumulators: blocks * B * L * N * parts for each of dB and dC that is variable, and slabs * sums * D.
constexpr int64_t cpu_bwd_workspace_bytes(const BwdParams& p) {
  const int64_t variable = (p.B.constant() ? 0 : 1) + (p.C.constant() ? 0 : 1);
  const int64_t of_tokens = num_blocks(p) * p.sequences.batch * p.sequences.length * p.states * p.parts();
  return (variable * of_tokens + num_slabs(p) * sums_of_channel(p) * p.channels) * size_of(p.accumulator);
}

}  // namespace
}  // namespace seqkern::selective_scan

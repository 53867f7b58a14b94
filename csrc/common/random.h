// Random numbers that are a function of a seed and a position, so that a backward pass makes those of the forward again
// and none are stored: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011).
#pragma once
#include "common/number.h"

namespace seqkern {
namespace {

struct Random4 {
  uint32_t word[4];  // each uniform over all values
};

// `position` in three parts, below 2^64, 2^32 and 2^32.
SEQKERN_FUNCTION Random4 philox(uint64_t seed, uint64_t first, uint32_t second, uint32_t third) {
  Random4 x = {{static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32), second, third}};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * x.word[0], b = uint64_t{0xCD9E8D57u} * x.word[2];
    x = {{static_cast<uint32_t>(b >> 32) ^ x.word[1] ^ key[0], static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ x.word[3] ^ key[1], static_cast<uint32_t>(a)}};
    key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
  }
  return x;
}

// True for a part `probability` of all words.
SEQKERN_FUNCTION bool happens(uint32_t word, float probability) {
  return static_cast<float>(word >> 8) * 0x1p-24f < probability;
}

}  // namespace
}  // namespace seqkern

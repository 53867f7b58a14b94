// The tensor-core primitives of common/mma.cuh: the lanes meet, and the last one computes the product of all.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/simt/runtime.h"
#include "common/simt/types.h"

namespace seqkern {
namespace simt {

inline constexpr unsigned kWholeWarp = 0xffffffffu;

struct MmaRecord {
  float d[4];
  uint32_t a[4], b[2];
};

// Element `half` (0 or 1) of a register of two.
template <typename T>
float unpack(uint32_t packed, int half) {
  const uint16_t bits = static_cast<uint16_t>(packed >> (16 * half));
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return float_from_bfloat16(bits);
  return float_from_half(bits);
}

// What the tensor core reads of a register: the upper 19 bits.
inline float tf32(uint32_t bits) {
  return float_of(bits & 0xffffe000u);
}

// d (16, 8) += a (16, kDepth) b (kDepth, 8), where a_of and b_of find an element among the lanes. The sum over k is
// exact products added in fp32; a device adds them in an order of its own.
template <int kDepth, typename A, typename B>
void multiply(const Lanes<MmaRecord>& lanes, A a_of, B b_of) {
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float& d = lanes[row % 8 * 4 + column / 2].d[row / 8 * 2 + column % 2];
      for (int k = 0; k < kDepth; ++k) d += a_of(row, k) * b_of(k, column);
    }
  }
}

}  // namespace simt

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  simt::Site where = simt::Site::current()) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "a 16-bit type");
  simt::MmaRecord mine;
  std::memcpy(mine.d, d, sizeof d);
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  simt::meet("mma_m16n8k16", simt::kWholeWarp, where, mine, [](simt::Lanes<simt::MmaRecord> lanes) {
    simt::multiply<16>(
        lanes,
        [&](int row, int k) { return simt::unpack<T>(lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2); },
        [&](int k, int column) { return simt::unpack<T>(lanes[column * 4 + k % 8 / 2].b[k / 8], k % 2); });
  });
  std::memcpy(d, mine.d, sizeof d);
}

// To nearest, ties away from zero.
inline uint32_t to_tf32(float value) {
  const uint32_t bits = simt::bits_of(value);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             simt::Site where = simt::Site::current()) {
  simt::MmaRecord mine;
  std::memcpy(mine.d, d, sizeof d);
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  simt::meet("mma_m16n8k8_tf32", simt::kWholeWarp, where, mine, [](simt::Lanes<simt::MmaRecord> lanes) {
    simt::multiply<8>(
        lanes, [&](int row, int k) { return simt::tf32(lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]); },
        [&](int k, int column) { return simt::tf32(lanes[column * 4 + k % 4].b[k / 4]); });
  });
  std::memcpy(d, mine.d, sizeof d);
}

// Every lane reads the row that it names, so that a sanitizer sees the access; then the rows are dealt out.
template <bool kTranspose = false, int kCount>
void load_matrix(uint32_t (&r)[kCount], const void* row, simt::Site where = simt::Site::current()) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "1, 2 or 4 matrices");
  struct Record {
    uint16_t row[8];
    uint32_t r[kCount];
  } mine{};
  if (simt::lane() < 8 * kCount) {
    if (!simt::in_shared_memory(row)) simt::fail("load_matrix from an address that is not in shared memory", where);
    simt::check_aligned(row, 16, where);
    std::memcpy(mine.row, row, 16);
  }
  simt::meet("load_matrix", simt::kWholeWarp, where, mine, [](simt::Lanes<Record> lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < kCount; ++i) {
        const int g = lane / 4, q = lane % 4;
        const auto element = [&](int e) {
          return kTranspose ? lanes[8 * i + 2 * q + e].row[g] : lanes[8 * i + g].row[2 * q + e];
        };
        lanes[lane].r[i] = static_cast<uint32_t>(element(0)) | static_cast<uint32_t>(element(1)) << 16;
      }
    }
  });
  std::memcpy(r, mine.r, sizeof r);
}

}  // namespace seqkern

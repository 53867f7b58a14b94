// The packings that the torch-free programs try, and their sequences as the mathematics sees them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "common/sequences.h"

namespace seqkern::naive {

enum class Packing { kPlain, kCuSeqlens, kSeqIdx };

inline const char* text(Packing packing) {
  const char* names[] = {"plain", "cu_seqlens", "seq_idx"};
  return names[static_cast<int>(packing)];
}

// A sequence: tokens in processing order.
struct Sequence {
  int64_t b;
  std::vector<int64_t> tokens;  // positions in memory
  int64_t initial, final;       // rows of states, -1: none
};

// A random batch of sequences.
struct Batch {
  Sequences sequences;
  std::vector<Sequence> all;

  Batch(Packing packing, int64_t B, int64_t L, bool reverse, std::mt19937& random) {
    sequences.batch = B, sequences.length = L, sequences.count = B, sequences.reverse = reverse;
    if (packing == Packing::kPlain) {
      for (int64_t b = 0; b < B; ++b) add(b, 0, L, b, b);
    } else if (packing == Packing::kCuSeqlens) {
      draw_starts(random);
    } else {
      draw_ids(random);
    }
  }
  Batch(const Batch&) = delete;  // `sequences` points into it

  bool padding(int64_t b, int64_t t) const { return !ids_.empty() && ids_[b * sequences.length + t] < 0; }

 private:
  std::vector<int64_t> starts_;
  std::vector<int32_t> starts32_, ids_;

  void add(int64_t b, int64_t begin, int64_t end, int64_t initial, int64_t final) {
    Sequence s{b, {}, initial, final};
    for (int64_t t = begin; t < end; ++t) s.tokens.push_back(sequences.reverse ? begin + end - 1 - t : t);
    all.push_back(s);
  }

  void draw_starts(std::mt19937& random) {
    const int64_t L = sequences.length;
    starts_ = {0, 0};  // begins and ends with an empty sequence
    for (int64_t t = 0; t < L;) {
      t = std::min(L, t + static_cast<int64_t>(random() % 3 == 0 ? random() % 4 : random() % (L / 2 + 2)));
      starts_.push_back(t);
    }
    starts_.push_back(L);
    starts32_.assign(starts_.begin(), starts_.end());
    sequences.count = static_cast<int64_t>(starts_.size()) - 1;
    sequences.cu_seqlens_is_int64 = random() % 2;
    sequences.cu_seqlens = sequences.cu_seqlens_is_int64 ? static_cast<const void*>(starts_.data()) : starts32_.data();
    for (int64_t n = 0; n < sequences.count; ++n) add(0, starts_[n], starts_[n + 1], n, n);
  }

  void draw_ids(std::mt19937& random) {
    const int64_t B = sequences.batch, L = sequences.length;
    for (int64_t b = 0; b < B; ++b) {
      const bool only_padding = B > 2 && b == 1;
      int32_t id = random() % 2 ? -1 : 0;
      for (int64_t t = 0; t < L; ++t) {
        if (random() % (L / 4 + 2) == 0) id = static_cast<int32_t>(random() % 4) - 1;
        ids_.push_back(only_padding ? -1 : id);
      }
    }
    sequences.seq_idx = ids_.data();
    for (int64_t b = 0; b < B; ++b) {
      const size_t row = all.size();
      const int32_t* id = ids_.data() + b * L;
      for (int64_t begin = 0, end; begin < L; begin = end) {
        for (end = begin + 1; end < L && id[end] == id[begin]; ++end) {
        }
        if (id[begin] >= 0) add(b, begin, end, -1, -1);
      }
      if (all.size() == row) add(b, 0, 0, -1, -1);
      (sequences.reverse ? all.back() : all[row]).initial = b;
      (sequences.reverse ? all[row] : all.back()).final = b;
    }
  }
};

}  // namespace seqkern::naive

// How the tokens of a (B, L) batch form sequences: the same three ways for every operator.
//
//   plain       B sequences of L tokens
//   cu_seqlens  B = 1; sequence n is [cu_seqlens[n], cu_seqlens[n + 1]); empty sequences are allowed
//   seq_idx     in every row, each maximal run of one id >= 0 is a sequence; ids < 0 are padding. The initial state
//               enters the row's first sequence, the final state follows its last non-padding token
//
// "First" and "last" follow the direction: with `reverse` time runs from L - 1 to 0.
#pragma once
#include <cstdint>

namespace seqkern {

struct Sequences {
  int64_t batch = 0;                 // B
  int64_t length = 0;                // L
  int64_t count = 0;                 // N, rows of the states: B, or the number of sequences in cu_seqlens
  const void* cu_seqlens = nullptr;  // (N + 1,), int64 if cu_seqlens_is_int64 else int32
  bool cu_seqlens_is_int64 = false;
  const int32_t* seq_idx = nullptr;  // (B, L), contiguous
  bool reverse = false;
};

// One stretch of tokens that belong together: [begin, end) of batch row b, in memory order.
struct Run {
  int64_t b, begin, end;
  int64_t initial;       // row of initial_state that enters it, -1: zeros
  int64_t final;         // row of final_state that follows it, -1: none
  bool padding;          // no sequence: outputs and gradients are zero
  int64_t sequence = 0;  // of the batch, or of the row with seq_idx
};

}  // namespace seqkern

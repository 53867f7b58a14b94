// From torch tensors to the torch-free structs of params.h.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/check.h"
#include "common/layout.h"
#include "common/sequences.h"

namespace seqkern {

inline ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return ScalarType::Float;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat16:
      return ScalarType::Half;
    default:
      return ScalarType::Double;
  }
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

inline Tensor zeros(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::new_zeros(like, shape, type);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(as_contiguous(*tensor)) : std::nullopt;
}

// Kernels write through the same struct, so constness ends here; an operator's schema says what it mutates.
inline Array array(const Checker& check, const char* name, const std::optional<Tensor>& tensor) {
  if (!tensor) return {};
  return {tensor->data_ptr(), check.floating(name, *tensor)};
}

// A (B, D, L) tensor is read and written where it lies if its time or its channels are contiguous. Outputs take the
// order of the input that they belong to.
bool prefers_channels(const Tensor& t);
// The tensor itself where its memory order is the one asked for, else a copy.
Tensor in_order(const Tensor& t, bool channels_first);
Tensor empty_in_order(const Tensor& like, int64_t B, int64_t D, int64_t L, ScalarType type, bool channels_first);
// The stride of a dimension of size 1 is arbitrary: here it is what the memory order implies.
Strides strides(const Tensor& t, bool channels_first);

// Tensors that say how the tokens form sequences, checked; they must outlive the Sequences made of them.
struct Packing {
  std::optional<Tensor> cu_seqlens;  // (N + 1,) int32 or int64, contiguous
  std::optional<Tensor> seq_idx;     // (B, L) int32, contiguous

  Packing() = default;
  // Of x: (B, D, L) or (B, L, ...), with `B` and `L` its batch and time dimensions.
  Packing(const Checker& check, const char* x_name, const Tensor& x, int64_t B, int64_t L,
          const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& seq_idx);
  Sequences sequences(int64_t B, int64_t L, bool reverse) const;

  // Reads device tensors back and checks their values where SEQKERN_CHECK=1 asks for it (this synchronises).
  void check_values(const Checker& check, const Sequences& sequences) const;
};

// The runs of a batch, read on the host, ascending in b and begin; every state row is the `final` of exactly one run.
// Raises where cu_seqlens does not start at 0, decreases, or does not end at L.
std::vector<Run> host_runs(const Checker& check, const Sequences& sequences);

// The same runs, cut so that each token whose reset (B, L) is true begins one that no state enters.
std::vector<Run> cut_at_resets(const std::vector<Run>& runs, const Sequences& sequences, const bool* reset);

// Rows of a state pool of `rows` rows that the B batch rows of a step own: (B,) int32 or int64, contiguous.
struct StateIndices {
  std::optional<Tensor> indices;
  bool is_int64 = false;

  StateIndices(const Checker& check, const std::optional<Tensor>& indices, const char* x_name, const Tensor& x,
               int64_t B, int64_t rows);
  const void* data() const { return indices ? indices->data_ptr() : nullptr; }
};

// SEQKERN_CHECK=1: raise for bad values in device tensors too, at the price of a synchronisation.
bool checks_values();

}  // namespace seqkern

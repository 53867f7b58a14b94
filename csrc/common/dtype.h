// Element types, as data: what a params.h can say about a tensor without templates and without torch.
#pragma once
#include <cstdint>

namespace seqkern {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Sums and states: fp32, or fp64 for fp64 data.
constexpr DType accumulator(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// Operands of matrix products: float32 for float16, whose numbers are exact in it, where sums of them cannot overflow.
constexpr DType operand_of(DType data) {
  return data == DType::kFloat16 ? DType::kFloat32 : data;
}

// A contiguous tensor whose element type the kernel reads at run time: parameters and states, which are small and
// may differ from the data in dtype. `data == nullptr` means absent.
struct Array {
  void* data = nullptr;
  DType dtype = DType::kFloat32;

  constexpr explicit operator bool() const { return data != nullptr; }
};

}  // namespace seqkern

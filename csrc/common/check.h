// Checks of tensor arguments, and the sentences they fail with. Only op.cpp calls them, once per argument.
#pragma once
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/library.h"

namespace seqkern {

using torch::headeronly::ScalarType;

// A dimension by its letter and, where it is settled, its size: {"D", 64}, or {"W"} for any size.
struct Dim {
  const char* name = nullptr;
  int64_t size = -1;
};

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream out;
  out << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.size(i);
  out << (tensor.dim() == 1 ? ",)" : ")");
  return out.str();
}

using Dims = std::span<const Dim>;

inline std::string shape_text(Dims dims) {
  std::ostringstream out;
  const char* separator = "";
  out << "(";
  for (const Dim& dim : dims) {
    out << separator << dim.name;
    if (dim.size >= 0) out << "=" << dim.size;
    separator = ", ";
  }
  out << (dims.size() == 1 ? ",)" : ")");
  return out.str();
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

// Checks on behalf of one operator; every message begins with its name.
class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}

  void shape(const char* name, const Tensor& tensor, Dims dims) const {
    bool ok = tensor.dim() == static_cast<int64_t>(dims.size());
    int64_t i = 0;
    if (ok)
      for (const Dim& dim : dims) ok = ok && (dim.size < 0 || dim.size == tensor.size(i)), ++i;
    if (!ok) fail(name, " must be ", shape_text(dims), ", got ", shape_text(tensor));
  }
  void shape(const char* name, const Tensor& tensor, std::initializer_list<Dim> dims) const {
    shape(name, tensor, Dims(dims.begin(), dims.size()));
  }

  // float32, bfloat16, float16 or float64.
  DType floating(const char* name, const Tensor& tensor) const {
    switch (tensor.scalar_type()) {
      case ScalarType::Float:
        return DType::kFloat32;
      case ScalarType::BFloat16:
        return DType::kBFloat16;
      case ScalarType::Half:
        return DType::kFloat16;
      case ScalarType::Double:
        return DType::kFloat64;
      default:
        fail(name, " must be float32, bfloat16, float16 or float64, got ", dtype_name(tensor.scalar_type()),
             "; convert it with .to(...)");
    }
  }

  void same_dtype(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) const {
    if (tensor.scalar_type() != other.scalar_type())
      fail(name, " must have the dtype of ", other_name, " (", dtype_name(other.scalar_type()), "), got ",
           dtype_name(tensor.scalar_type()));
  }

  // int32 or int64; true for int64.
  bool index(const char* name, const Tensor& tensor) const {
    const bool is_int64 = tensor.scalar_type() == ScalarType::Long;
    if (!is_int64 && tensor.scalar_type() != ScalarType::Int)
      fail(name, " must be int32 or int64, got ", dtype_name(tensor.scalar_type()));
    return is_int64;
  }

  void int32(const char* name, const Tensor& tensor) const {
    if (tensor.scalar_type() != ScalarType::Int)
      fail(name, " must be int32, got ", dtype_name(tensor.scalar_type()), "; convert it with .int()");
  }

  void device(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) const {
    const auto mine = tensor.device(), theirs = other.device();
    if (mine.type() != theirs.type() || mine.index() != theirs.index())
      fail(name, " must be on the device of ", other_name, "; move it with .to(", other_name, ".device)");
  }

  void range(const char* name, int64_t value, int64_t low, int64_t high) const {
    if (value < low || value > high) fail(name, " must be ", low, " to ", high, ", got ", value);
  }

  template <class... Text>
  [[noreturn]] void fail(const Text&... text) const {
    std::ostringstream out;
    out << op_ << ": ";
    ((out << text), ...);
    throw std::runtime_error(out.str());
  }

 private:
  const char* op_;
};

}  // namespace seqkern

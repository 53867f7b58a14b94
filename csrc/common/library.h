// Where operators are registered, and how a launch finds its device. The same op.cpp serves three builds:
//
//   _ops.so            torch.ops.seqkern: CPU kernels, and CUDA kernels where the build has them
//   _emu.so            torch.ops.seqkern_emu: the CUDA path on CPU tensors, kernels run by common/simt (tests)
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "common/stream.h"

#if defined(SEQKERN_EMULATE)
#define SEQKERN_LIBRARY seqkern_emu
#define SEQKERN_REGISTER_CPU(...)
#define SEQKERN_REGISTER_CUDA(...)                 \
  STABLE_TORCH_LIBRARY_IMPL(seqkern_emu, CPU, m) { \
    __VA_ARGS__                                    \
  }
#else
#define SEQKERN_LIBRARY seqkern
#define SEQKERN_REGISTER_CPU(...)              \
  STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) { \
    __VA_ARGS__                                \
  }
#if defined(SEQKERN_WITH_CUDA)
#define SEQKERN_REGISTER_CUDA(...)              \
  STABLE_TORCH_LIBRARY_IMPL(seqkern, CUDA, m) { \
    __VA_ARGS__                                 \
  }
#else
#define SEQKERN_REGISTER_CUDA(...)
#endif
#endif

namespace seqkern {

using torch::stable::Tensor;

// Which kernels an operator body launches.
enum class Target { kCpu, kCuda };

#if defined(SEQKERN_EMULATE)

struct DeviceScope {
  Stream stream;
  explicit DeviceScope(const Tensor&) {}
};

#else

}  // namespace seqkern
// Lives in libtorch_cuda.so: a weak reference, so that the library also loads beside a CPU build of torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
namespace seqkern {

// Makes the tensor's device current and finds the stream that torch is using there.
struct DeviceScope {
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream;

  explicit DeviceScope(const Tensor& tensor) : guard(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "seqkern: a CUDA tensor was given, but this build of torch has no CUDA support");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream.handle));
  }
};

#endif

// Runs a CUDA path on the device of a tensor and on the stream that torch is using there.
template <class Params>
void launch_beside(const Tensor& tensor, void (*kernels)(const Params&, Stream), const Params& params) {
  const DeviceScope scope(tensor);
  kernels(params, scope.stream);
}

}  // namespace seqkern

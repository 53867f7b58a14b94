// launch(): the one way a kernel is started.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "common/device.h"
#include "common/stream.h"
#if defined(SEQKERN_EMULATE)
#include "common/simt/runtime.h"
#endif

namespace seqkern {

struct Grid {
  int64_t x = 1, y = 1, z = 1;  // blocks
};

struct Launch {
  const char* name;  // of the kernel, for error texts
  Grid grid;         // a zero anywhere: nothing is launched
  int threads;       // per block
  int64_t smem_bytes = 0;
  Stream stream = {};
};

namespace detail {

inline std::runtime_error launch_error(const Launch& how, const std::string& cause) {
  const Grid& g = how.grid;
  return std::runtime_error("seqkern: launch of " + std::string(how.name) + " failed: " + cause + " (grid " +
                            std::to_string(g.x) + "x" + std::to_string(g.y) + "x" + std::to_string(g.z) + ", threads " +
                            std::to_string(how.threads) + ", smem " + std::to_string(how.smem_bytes) + " bytes)");
}

// The limits of every architecture from sm_80 on. Those that differ between devices are left to the driver.
inline void check_limits(const Launch& how) {
  const Grid& g = how.grid;
  if (g.x < 0 || g.x > 0x7fffffff || g.y < 0 || g.y > 65535 || g.z < 0 || g.z > 65535) {
    throw launch_error(how, "a grid has at most 2147483647 x 65535 x 65535 blocks");
  }
  if (how.threads < 1 || how.threads > 1024) throw launch_error(how, "a block has 1 to 1024 threads");
}

}  // namespace detail

#if defined(SEQKERN_EMULATE)

template <typename... Params, typename... Args>
void launch(const Launch& how, void (*kernel)(Params...), Args&&... args) {
  detail::check_limits(how);
  if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return;
  if (how.smem_bytes > simt::kMaxSharedBytes) {
    throw detail::launch_error(
        how, "a block has at most " + std::to_string(simt::kMaxSharedBytes) + " bytes of shared memory");
  }
  std::tuple<Params...> copied(std::forward<Args>(args)...);
  const dim3 grid(static_cast<unsigned>(how.grid.x), static_cast<unsigned>(how.grid.y),
                  static_cast<unsigned>(how.grid.z));
  simt::run(how.name, grid, dim3(static_cast<unsigned>(how.threads)), static_cast<size_t>(how.smem_bytes),
            [&] { std::apply(kernel, copied); });
}

#else

template <typename... Params, typename... Args>
void launch(const Launch& how, void (*kernel)(Params...), Args&&... args) {
  constexpr int64_t kDefaultSharedBytes = 48 << 10;  // more has to be asked for
  detail::check_limits(how);
  if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return;
  const auto check = [&](cudaError_t error) {
    if (error == cudaSuccess) return;
    throw detail::launch_error(how, std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error));
  };
  if (how.smem_bytes > kDefaultSharedBytes) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(how.smem_bytes)));
  }
  const dim3 grid(static_cast<unsigned>(how.grid.x), static_cast<unsigned>(how.grid.y),
                  static_cast<unsigned>(how.grid.z));
  kernel<<<grid, static_cast<unsigned>(how.threads), static_cast<size_t>(how.smem_bytes),
           static_cast<cudaStream_t>(how.stream.handle)>>>(std::forward<Args>(args)...);
  check(cudaGetLastError());
}

#endif

// The entry of a kernel table that fits. A table without one is an error here: else the launch would silently be none.
template <typename Instance, size_t kCount, typename Fits>
const Instance& find_instance(const Instance (&table)[kCount], const char* name, Fits fits) {
  for (const Instance& instance : table) {
    if (fits(instance)) return instance;
  }
  throw std::logic_error(std::string("seqkern: the table of ") + name +
                         " has no kernel for this call; please report it");
}

}  // namespace seqkern

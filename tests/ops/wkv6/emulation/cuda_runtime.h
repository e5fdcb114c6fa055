// The part of the CUDA runtime and of CUDA C++ that the kernels and their launchers use, on the
// CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

#define EMULATION_TEXT(x) #x
#define EMULATION_PLACE(file, line) file ":" EMULATION_TEXT(line)
#define __syncthreads()                                                   \
  do {                                                                    \
    static const char* const place = EMULATION_PLACE(__FILE__, __LINE__); \
    emulation::barrier(place);                                            \
  } while (false)
#define __syncwarp() emulation::warp_barrier(__LINE__)

namespace emulation {

enum Kind { SHUFFLE = 100000, LOAD_MATRICES, LOAD_MATRICES_TRANSPOSED, TRANSPOSE_MATRIX, MMA };

}  // namespace emulation

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  emulation::Contribution mine{emulation::SHUFFLE + 1000 * mask};
  std::memcpy(mine.words, &value, sizeof value);
  const emulation::Contribution* const lanes = emulation::collect(mine);
  std::memcpy(&value, lanes[emulation::lane() ^ mask].words, sizeof value);
  return value;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

// What a block may take on the smallest of the GPUs that the kernels are for (compute capability
// 8.6).
constexpr size_t SHARED_MEMORY_LIMIT = 99 * 1024;

namespace finchtune {
// The kernels' `extern __shared__` array. A block sees NaN in what it has not written.
alignas(128) inline unsigned char dynamic_shared[SHARED_MEMORY_LIMIT + 4096];
}  // namespace finchtune

namespace emulation {

// Bytes of shared memory that kernels have been allowed beyond what each may have.
inline std::map<const void*, size_t> allowed;

template <typename Kernel>
bool may_start(const cudaLaunchConfig_t& config, Kernel* kernel) {
  const size_t shared = std::max<size_t>(48 * 1024, allowed[reinterpret_cast<void*>(kernel)]);
  return config.dynamicSmemBytes <= shared && config.gridDim.x >= 1 &&
         config.gridDim.x <= INT32_MAX && config.blockDim.x <= 1024;
}

}  // namespace emulation

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (static_cast<size_t>(value) > SHARED_MEMORY_LIMIT) return cudaErrorInvalidValue;
  emulation::allowed[reinterpret_cast<void*>(kernel)] = value;
  return cudaSuccess;
}

template <typename Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args),
                               const Args& args) {
  using namespace emulation;
  if (!may_start(*config, kernel)) return cudaErrorInvalidConfiguration;
  last_error.clear();
  blockDim = config->blockDim;
  kernel_body = [=] { kernel(args); };
  try {
    for (unsigned x = 0; x < config->gridDim.x; x++) {
      blockIdx.x = x;
      current = nullptr;
      std::fill(std::begin(finchtune::dynamic_shared), std::end(finchtune::dynamic_shared), 0xff);
      run_block();
      if (std::any_of(finchtune::dynamic_shared + config->dynamicSmemBytes,
                      std::end(finchtune::dynamic_shared),
                      [](unsigned char byte) { return byte != 0xff; })) {
        last_error = "a write behind the end of shared memory";
        return cudaErrorLaunchFailure;
      }
    }
  } catch (const std::runtime_error&) {
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulation::multiprocessors
                                                       : emulation::capability;
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorMisalignedAddress:
      return "misaligned address";
    default:
      return emulation::last_error.c_str();
  }
}

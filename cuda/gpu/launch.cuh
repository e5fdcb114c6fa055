// What launchers of kernels share, whatever the kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace finchtune {

// Several values at a time are moved, so that every tensor must begin at a multiple of 16 bytes.
template <typename... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An attribute of the current device; 1 without one, and the launch will report what is wrong.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 1;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 1;
}

constexpr size_t ALWAYS_ALLOWED = 48 * 1024;  // bytes of shared memory of a thread block
constexpr size_t MUCH_SHARED = 32 * 1024;     // from here on it says how many blocks fit

// Leaves as much of the level-1 cache as possible to shared memory, for a kernel whose blocks would
// otherwise wait for it. Only a hint, so that an error does not count.
template <typename Args>
void prefer_shared_memory(void (*kernel)(Args)) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                       cudaSharedmemCarveoutMaxShared);
}

template <typename Args>
cudaError_t launch(void (*kernel)(Args), int64_t blocks, int threads, size_t shared_bytes,
                   void* stream, const Args& args) {
  if (blocks < 1 || blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes >= MUCH_SHARED) prefer_shared_memory(kernel);
  if (shared_bytes > ALWAYS_ALLOWED) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace finchtune

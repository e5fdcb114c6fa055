// Which problems the launchers take, on tensor cores or not, and the C++ type of their elements.
#pragma once

#include "fragments.cuh"
#include "launch.cuh"

namespace wkv6 {

inline bool valid(const Wkv6Problem& p) {
  return p.B >= 1 && p.T >= 1 && p.H >= 1 && p.N >= 8 && p.N <= 128 && p.N % 8 == 0 &&
         p.dtype >= WKV6_FP32 && p.dtype <= WKV6_FP16 &&
         (p.cu_seqlens == nullptr ? p.n_seq == p.B : p.B == 1 && p.n_seq >= 1);
}

// Below this many tokens a block of the tensor-core kernels is mostly empty.
constexpr int64_t SHORTEST_FOR_TENSOR_CORES = BLOCK + 1;

inline bool uses_tensor_cores(const Wkv6Problem& p) {
  return p.dtype == WKV6_BF16 && p.N == HEAD_SIZE && p.T >= SHORTEST_FOR_TENSOR_CORES &&
         finchtune::device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8;
}

// Bytes of shared memory that a thread block may have on every GPU of compute capability 8.0 or
// more, and that the blocks of a multiprocessor share on 9.0; each takes 1 KB beyond its own.
constexpr size_t BLOCK_LIMIT = 99 * 1024, MULTIPROCESSOR_LIMIT = 228 * 1024, RESERVED = 1024;

// Calls f with a value of the C++ type of the problem's dtype.
template <typename F>
cudaError_t with_dtype(const Wkv6Problem& p, F f) {
  switch (p.dtype) {
    case WKV6_BF16:
      return f(__nv_bfloat16());
    case WKV6_FP16:
      return f(__half());
    default:
      return f(float());
  }
}

}  // namespace wkv6

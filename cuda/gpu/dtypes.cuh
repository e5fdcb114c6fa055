// Which problems the launchers take, and the C++ type of a problem's elements.
#pragma once

#include "launch.cuh"
#include "problem.cuh"

namespace wkv6 {

inline bool valid(const Wkv6Problem& p) {
  return p.B >= 1 && p.T >= 1 && p.H >= 1 && p.N >= 8 && p.N <= 128 && p.N % 8 == 0 &&
         p.dtype >= WKV6_FP32 && p.dtype <= WKV6_FP16 &&
         (p.cu_seqlens == nullptr ? p.n_seq == p.B : p.B == 1 && p.n_seq >= 1);
}

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

// What the WKV operators of all generations share on a GPU.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../gpu/wkv6.h"
#include "wkv_call.h"

namespace finchtune {

// A generation's call on a GPU: the problem as its launchers take it.
template <typename Call>
struct OnGpu : Call {
  c10::cuda::CUDAGuard guard;  // kernels and scratch memory go to r's device,
  void* stream;                // and onto the stream that torch uses there
  Wkv6Problem problem;

  template <typename... Arguments>
  explicit OnGpu(const Arguments&... arguments)
      : Call(arguments...),
        guard(this->r().device()),
        stream(c10::cuda::getCurrentCUDAStream().stream()) {
    problem = {this->B,
               this->T,
               this->H,
               this->N,
               dtype(),
               this->n_sequences,
               this->cu_seqlens ? this->cu_seqlens->template const_data_ptr<int32_t>() : nullptr};
  }

  int32_t dtype() const {
    switch (this->r().scalar_type()) {
      case at::kFloat:
        return WKV6_FP32;
      case at::kBFloat16:
        return WKV6_BF16;
      case at::kHalf:
        return WKV6_FP16;
      default:
        TORCH_CHECK(false, "wkv: the GPU kernels do not take ", this->r().scalar_type());
    }
  }

  // Also clears the error, which would otherwise be found after the next call of anybody.
  static void succeed(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }

  at::Tensor scratch(size_t bytes) const {
    return at::empty({static_cast<int64_t>(bytes)}, this->r().options().dtype(at::kByte));
  }
};

}  // namespace finchtune

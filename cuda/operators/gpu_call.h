// What the operators for a GPU share: where their work goes, and dtypes.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>
#include <vector>

#include "../gpu/elementwise.h"
#include "dense.h"

namespace finchtune {

// Kernels go to the device of a tensor, onto the stream that torch uses there.
struct GpuCall {
  c10::cuda::CUDAGuard guard;
  void* stream;

  explicit GpuCall(const at::Tensor& x)
      : guard(x.device()), stream(c10::cuda::getCurrentCUDAStream().stream()) {}

  static void succeed(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }
};

inline int elementwise_dtype(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return ELEMENTWISE_FP32;
    case at::kBFloat16:
      return ELEMENTWISE_BF16;
    case at::kHalf:
      return ELEMENTWISE_FP16;
    default:
      TORCH_CHECK(false, "the GPU kernels take fp32, bf16 and fp16, not ", x.scalar_type());
  }
}

inline void check_like(const at::Tensor& x, at::IntArrayRef shape, const at::Tensor& like) {
  TORCH_CHECK(
      x.sizes() == shape && x.scalar_type() == like.scalar_type() && x.device() == like.device(),
      "expected ", shape, " ", like.scalar_type(), " on ", like.device(), ", got ", x.sizes(), " ",
      x.scalar_type(), " on ", x.device());
}

inline const void* pointer_or_null(const std::optional<at::Tensor>& x) {
  return x ? x->const_data_ptr() : nullptr;
}

inline at::Tensor bytes(size_t count, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(count)}, like.options().dtype(at::kByte));
}

inline at::Tensor floats(at::IntArrayRef shape, const at::Tensor& like) {
  return at::empty(shape, like.options().dtype(at::kFloat));
}

}  // namespace finchtune

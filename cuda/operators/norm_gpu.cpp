// The torch operators of norm.h: layer norm joined with the residual sum before it, on a GPU.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "../gpu/norm.h"
#include "gpu_call.h"

namespace finchtune {
namespace {

using at::Tensor;
using std::optional;

LayerNorm layer_norm(const Tensor& x, const Tensor& weight, double eps) {
  const int64_t C = weight.numel();
  TORCH_CHECK(x.numel() > 0 && C > 0 && x.dim() > 0 && x.size(-1) == C,
              "added_norm: x (..., C) must not be empty, weight (C)");
  TORCH_CHECK(C * x.element_size() <= MOST_NORM_BYTES, "added_norm: a row of x has at most ",
              +MOST_NORM_BYTES, " bytes");
  return {x.numel() / C, C, static_cast<float>(eps), elementwise_dtype(x)};
}

std::tuple<Tensor, Tensor, Tensor> added_norm(const Tensor& any_x, const optional<Tensor>& any_y,
                                              const Tensor& any_weight, const Tensor& any_bias,
                                              double eps) {
  const GpuCall call(any_x);
  const Tensor x = dense(any_x), weight = dense(any_weight), bias = dense(any_bias);
  const optional<Tensor> y = dense(any_y);
  const LayerNorm norm = layer_norm(x, weight, eps);
  check_like(weight, {norm.channels}, x);
  check_like(bias, {norm.channels}, x);
  if (y) check_like(*y, x.sizes(), x);
  Tensor total = y ? at::empty_like(x) : at::empty({0}, x.options());
  Tensor normed = at::empty_like(x), moments = floats({norm.rows, 2}, x);
  GpuCall::succeed(finchtune_added_norm(
      &norm, x.const_data_ptr(), pointer_or_null(y), weight.const_data_ptr(), bias.const_data_ptr(),
      y ? total.data_ptr() : nullptr, normed.data_ptr(), moments.data_ptr<float>(), call.stream));
  return {total, normed, moments};
}

std::tuple<Tensor, Tensor, Tensor> added_norm_backward(const Tensor& any_dnormed,
                                                       const optional<Tensor>& any_dtotal,
                                                       const Tensor& any_total,
                                                       const Tensor& any_moments,
                                                       const Tensor& any_weight, bool of_weight) {
  const GpuCall call(any_total);
  const Tensor total = dense(any_total), dnormed = dense(any_dnormed), weight = dense(any_weight),
               moments = dense(any_moments);
  const optional<Tensor> dtotal = dense(any_dtotal);
  const LayerNorm norm = layer_norm(total, weight, 0);
  check_like(dnormed, total.sizes(), total);
  check_like(weight, {norm.channels}, total);
  if (dtotal) check_like(*dtotal, total.sizes(), total);
  TORCH_CHECK(moments.numel() == 2 * norm.rows && moments.scalar_type() == at::kFloat,
              "added_norm_backward: two moments of each row, fp32");
  Tensor dx = at::empty_like(total), both = floats({2, of_weight ? norm.channels : 0}, total);
  Tensor scratch = bytes(of_weight ? finchtune_added_norm_scratch_bytes(&norm) : 0, total);
  GpuCall::succeed(finchtune_added_norm_backward(
      &norm, total.const_data_ptr(), moments.const_data_ptr<float>(), weight.const_data_ptr(),
      dnormed.const_data_ptr(), pointer_or_null(dtotal), dx.data_ptr(),
      of_weight ? both.data_ptr<float>() : nullptr, of_weight ? scratch.data_ptr() : nullptr,
      call.stream));
  return {dx, both[0], both[1]};
}

}  // namespace
}  // namespace finchtune

TORCH_LIBRARY_IMPL(finchtune, CUDA, library) {
  library.impl("added_norm", &finchtune::added_norm);
  library.impl("added_norm_backward", &finchtune::added_norm_backward);
}

// The torch operators of Bone, Bat and quantised weights, on a GPU: what they do beside the products
// with W.

#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "gpu_call.h"

namespace finchtune {
namespace {

using at::Tensor;

void check_rows(const Tensor& x, const char* name) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.numel() > 0, name,
              " must be dense and not empty, with two dimensions");
}

Tensor shard_sums(const Tensor& any_x, int64_t r, at::ScalarType dtype) {
  const GpuCall call(any_x);
  const Tensor x = dense(any_x);
  check_rows(x, "shard_sums: x");
  TORCH_CHECK(r > 0, "shard_sums: r must be above zero");
  Tensor sums = at::empty({x.size(0), r}, x.options().dtype(dtype));
  GpuCall::succeed(finchtune_shard_sums(elementwise_dtype(x), elementwise_dtype(sums), x.size(0),
                                        x.size(1), r, x.const_data_ptr(), sums.data_ptr(),
                                        call.stream));
  return sums;
}

void add_to_shards_(Tensor& x, const Tensor& any_s) {
  const GpuCall call(x);
  const Tensor s = dense(any_s);
  check_rows(x, "add_to_shards_: x");
  check_rows(s, "add_to_shards_: s");
  TORCH_CHECK(x.size(0) == s.size(0), "add_to_shards_: a row of s for each of x");
  GpuCall::succeed(finchtune_add_to_shards(elementwise_dtype(x), elementwise_dtype(s), x.size(0),
                                           x.size(1), s.size(1), x.data_ptr(), s.const_data_ptr(),
                                           call.stream));
}

// x (T, n r) as n matrices (T, r), without copying.
Tensor by_shard(const Tensor& x, const Tensor& D) {
  check_rows(x, "bat_row: x");
  TORCH_CHECK(D.dim() == 3 && D.size(1) == D.size(2) && D.size(0) * D.size(1) == x.size(1) &&
                  D.scalar_type() == x.scalar_type(),
              "bat_row: D must be (k / r, r, r) and of the dtype of x (T, k)");
  return x.unflatten(1, {D.size(0), D.size(1)}).transpose(0, 1);
}

std::tuple<Tensor, Tensor> bat_row_forward(const Tensor& any_x, const Tensor& D) {
  const GpuCall call(any_x);
  const Tensor x = dense(any_x), u = at::bmm(by_shard(x, D), D.mT());
  Tensor moved = at::empty_like(x), sums = floats({x.size(0), D.size(1)}, x);
  GpuCall::succeed(finchtune_move_shards(elementwise_dtype(x), x.size(0), D.size(0), D.size(1),
                                         x.const_data_ptr(), u.const_data_ptr(), moved.data_ptr(),
                                         sums.data_ptr<float>(), call.stream));
  return {moved, sums};
}

Tensor bat_row_backward_(Tensor& dx, const Tensor& any_x, const Tensor& D, const Tensor& any_sums) {
  const GpuCall call(dx);
  const Tensor x = dense(any_x), sums = dense(any_sums);
  const int64_t n = D.size(0), r = D.size(1);
  Tensor shards = by_shard(dx, D);
  TORCH_CHECK(dx.sizes() == x.sizes() && sums.sizes() == at::IntArrayRef({x.size(0), r}) &&
                  sums.scalar_type() == at::kFloat,
              "bat_row_backward_: dx must be like x (T, k), sums (T, r) fp32");
  Tensor q = at::empty({n, x.size(0), r}, x.options());
  GpuCall::succeed(finchtune_gather_shards(elementwise_dtype(x), x.size(0), n, r,
                                           dx.const_data_ptr(), sums.const_data_ptr<float>(),
                                           q.data_ptr(), call.stream));
  shards.baddbmm_(q, D);
  return at::bmm(q.mT(), by_shard(x, D));
}

// The weight (rows, columns) that codes and scales (the bits of fp32) stand for.
Tensor unpack(const Tensor& codes, const Tensor& scales, at::ArrayRef<double> table, int64_t rows,
              int64_t columns, at::ScalarType dtype) {
  const GpuCall call(codes);
  const Tensor dense_codes = dense(codes), dense_scales = dense(scales);
  const int64_t count = rows * columns, blocks = (count + 63) / 64;
  const bool halves = !table.empty();
  TORCH_CHECK(codes.numel() == blocks * (halves ? 32 : 64) && scales.numel() == blocks &&
                  scales.element_size() == 4 && (table.empty() || table.size() == 16),
              "unpack: blocks of 64 codes with a scale each, a table of 16 values or none");
  UnpackTable values = {};
  std::copy(table.begin(), table.end(), values.value);
  const int kind = halves                             ? UNPACK_TABLE
                   : codes.scalar_type() == at::kChar ? UNPACK_INT8
                                                      : UNPACK_E4M3;
  Tensor out = at::empty({rows, columns}, codes.options().dtype(dtype));
  GpuCall::succeed(finchtune_unpack(
      elementwise_dtype(out), kind, &values, count, dense_codes.const_data_ptr(),
      static_cast<const float*>(dense_scales.const_data_ptr()), out.data_ptr(), call.stream));
  return out;
}

}  // namespace
}  // namespace finchtune

TORCH_LIBRARY_IMPL(finchtune, CUDA, library) {
  library.impl("shard_sums", &finchtune::shard_sums);
  library.impl("add_to_shards_", &finchtune::add_to_shards_);
  library.impl("bat_row_forward", &finchtune::bat_row_forward);
  library.impl("bat_row_backward_", &finchtune::bat_row_backward_);
  library.impl("unpack", &finchtune::unpack);
}

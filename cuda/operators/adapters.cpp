// The torch operators of Bone and Bat, on a CPU: what they do beside the products with W, in fp32
// whatever the dtype.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "operators.h"

namespace finchtune {
namespace {

using at::Tensor;

void check_rows(const Tensor& x, const char* name) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), name, " must be dense, with two dimensions");
}

Tensor shard_sums_cpu(const Tensor& any_x, int64_t r, at::ScalarType dtype) {
  const Tensor x = dense(any_x);
  check_rows(x, "shard_sums: x");
  TORCH_CHECK(r > 0, "shard_sums: r must be above zero");
  Tensor sums = at::empty({x.size(0), r}, x.options().dtype(dtype));
  const Element element = element_of(x), of_sums = element_of(sums);
  const void* from = x.const_data_ptr();
  void* to = sums.data_ptr();
  at::parallel_for(0, x.size(0), 1, [&](int64_t first, int64_t last) {
    cpu_kernels().shard_sums(from, element, x.size(1), r, to, of_sums, first, last);
  });
  return sums;
}

void add_to_shards_cpu(Tensor& x, const Tensor& any_s) {
  const Tensor s = dense(any_s);
  check_rows(x, "add_to_shards_: x");
  check_rows(s, "add_to_shards_: s");
  TORCH_CHECK(x.size(0) == s.size(0) && s.size(1) > 0, "add_to_shards_: a row of s for each of x");
  const Element element = element_of(x), of_s = element_of(s);
  void* to = x.data_ptr();
  const void* added = s.const_data_ptr();
  at::parallel_for(0, x.size(0), 1, [&](int64_t first, int64_t last) {
    cpu_kernels().add_to_shards(to, element, x.size(1), added, of_s, s.size(1), first, last);
  });
}

// What plain torch does in finchtune/adapters/frozen.py, which defines the operator.
Tensor product_plus_cpu(const Tensor& s, const std::optional<Tensor>& D, const Tensor& x,
                        const Tensor& W) {
  Tensor y = at::mm(x, W.t());
  if (D) return y.addmm_(s, *D);
  const bool fits = y.scalar_type() == at::kFloat || y.scalar_type() == at::kBFloat16;
  fits ? add_to_shards_cpu(y, s) : (void)y.unflatten(1, {-1, s.size(1)}).add_(s.unsqueeze(1));
  return y;
}

Shards shards_of(const Tensor& x, const Tensor& D) {
  check_rows(x, "bat_row: x");
  TORCH_CHECK(D.dim() == 3 && D.size(1) == D.size(2) && D.size(0) * D.size(1) == x.size(1) &&
                  D.scalar_type() == x.scalar_type(),
              "bat_row: D must be (k / r, r, r) and of the dtype of x (T, k)");
  return {x.size(0), D.size(0), D.size(1), element_of(x)};
}

// In fp32, in rows of whole vectors.
Tensor padded(const Tensor& D, const Shards& shape) {
  Tensor rows = at::zeros({shape.n_shards, shape.r, shape.width()}, D.options().dtype(at::kFloat));
  rows.narrow(2, 0, shape.r).copy_(D);
  return rows;
}

std::tuple<Tensor, Tensor> bat_row_forward_cpu(const Tensor& any_x, const Tensor& D) {
  const Tensor x = dense(any_x);
  const Shards shape = shards_of(x, D);
  const Tensor matrices = padded(D.mT(), shape);
  Tensor moved = at::empty_like(x);
  Tensor sums = at::empty({shape.n_tokens, shape.r}, x.options().dtype(at::kFloat));
  const void* from = x.const_data_ptr();
  const float* matrix = matrices.const_data_ptr<float>();
  void* to = moved.data_ptr();
  float* sum = sums.data_ptr<float>();
  at::parallel_for(0, shape.n_tokens, 1, [&](int64_t first, int64_t last) {
    cpu_kernels().bat_row_forward(shape, from, matrix, to, sum, first, last);
  });
  return {moved, sums};
}

Tensor bat_row_backward_cpu(Tensor& dx, const Tensor& any_x, const Tensor& D,
                            const Tensor& any_sums) {
  const Tensor x = dense(any_x), sums = dense(any_sums);
  const Shards shape = shards_of(x, D);
  check_rows(dx, "bat_row_backward_: dx");
  check_rows(sums, "bat_row_backward_: sums");
  TORCH_CHECK(dx.sizes() == x.sizes() && dx.scalar_type() == x.scalar_type() &&
                  sums.size(0) == shape.n_tokens && sums.size(1) == shape.r,
              "bat_row_backward_: dx must be like x (T, k), sums (T, r)");
  const Tensor matrices = padded(D, shape);
  Tensor dD = at::empty({shape.n_shards, shape.r, shape.r}, D.options());
  void* gradient = dx.data_ptr();
  const void* input = x.const_data_ptr();
  const float* matrix = matrices.const_data_ptr<float>();
  const float* sum = sums.const_data_ptr<float>();
  void* result = dD.data_ptr();
  at::parallel_for(0, shape.n_shards, 1, [&](int64_t first, int64_t last) {
    cpu_kernels().bat_row_backward(shape, gradient, input, matrix, sum, result, first, last);
  });
  return dD;
}

}  // namespace
}  // namespace finchtune

TORCH_LIBRARY_IMPL(finchtune, CPU, library) {
  library.impl("shard_sums", &finchtune::shard_sums_cpu);
  library.impl("add_to_shards_", &finchtune::add_to_shards_cpu);
  library.impl("product_plus", &finchtune::product_plus_cpu);
  library.impl("bat_row_forward", &finchtune::bat_row_forward_cpu);
  library.impl("bat_row_backward_", &finchtune::bat_row_backward_cpu);
}

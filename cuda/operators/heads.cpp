// The torch operators of RWKV-7's parts around WKV7, on a CPU: every check, all memory, and the
// calls into the kernels.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "operators.h"

namespace finchtune {
namespace {

using at::Tensor;
using Kernel = void (*)(const HeadParts&, int64_t, int64_t);

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

std::vector<Tensor> made(int count, const Tensor& like, at::ScalarType dtype) {
  std::vector<Tensor> all;
  for (int i = 0; i < count; ++i)
    all.push_back(at::empty(like.sizes(), like.options().dtype(dtype)));
  return all;
}

template <typename Pointer>
std::vector<Pointer> pointers(const std::vector<Tensor>& tensors) {
  std::vector<Pointer> all;
  for (const Tensor& x : tensors) all.push_back(static_cast<Pointer>(x.data_ptr()));
  return all;
}

// One kernel on rows (tokens, heads * size) and weights (heads * size): `n_out` results as the rows
// and, if wanted, the gradients of the weights in fp32.
std::vector<Tensor> run(Kernel kernel, at::TensorList given, at::TensorList given_weights,
                        int64_t heads, double eps, int n_out, bool of_weights) {
  std::vector<Tensor> rows, weights;
  const Tensor& first = given[0];
  TORCH_CHECK(first.dim() == 2 && heads > 0 && first.size(1) % heads == 0,
              "heads: rows must be (tokens, heads * size), not ", first.sizes());
  for (const Tensor& x : given) {
    TORCH_CHECK(x.sizes() == first.sizes() && x.scalar_type() == first.scalar_type(),
                "heads: rows must be alike");
    rows.push_back(x.contiguous());
  }
  for (const Tensor& x : given_weights) {
    TORCH_CHECK(x.numel() == first.size(1) && x.scalar_type() == first.scalar_type(),
                "heads: a weight has a value for each channel, of the rows' dtype");
    weights.push_back(x.contiguous());
  }
  std::vector<Tensor> out = made(n_out, first, first.scalar_type());
  std::vector<Tensor> gradients;
  if (of_weights)
    for (const Tensor& x : weights) gradients.push_back(made(1, x, at::kFloat)[0]);
  const auto row = pointers<const void*>(rows), weight = pointers<const void*>(weights);
  const auto result = pointers<void*>(out);
  const auto gradient = pointers<float*>(gradients);
  const HeadParts parts = {first.size(0),
                           heads,
                           first.size(1) / heads,
                           static_cast<float>(eps),
                           element_of(first),
                           row.data(),
                           weight.data(),
                           result.data(),
                           of_weights ? gradient.data() : nullptr};
  const int64_t grain = std::max<int64_t>(1, kGrain * heads / std::max<int64_t>(1, first.numel()));
  at::parallel_for(0, heads, grain, [&](int64_t i, int64_t j) { kernel(parts, i, j); });
  out.insert(out.end(), gradients.begin(), gradients.end());
  return out;
}

Tensor value_residual(const Tensor& v, const Tensor& first, const Tensor& gate, int64_t heads) {
  return run(cpu_kernels().value_residual, {v, first, gate}, {}, heads, 0, 1, false)[0];
}

std::vector<Tensor> value_residual_backward(const Tensor& v, const Tensor& first,
                                            const Tensor& gate, const Tensor& dout, int64_t heads) {
  return run(cpu_kernels().value_residual_backward, {v, first, gate, dout}, {}, heads, 0, 3, false);
}

std::vector<Tensor> removal(const Tensor& k, const Tensor& rate, const Tensor& k_k,
                            const Tensor& k_a, int64_t heads, double eps) {
  return run(cpu_kernels().removal, {k, rate}, {k_k, k_a}, heads, eps, 3, false);
}

std::vector<Tensor> removal_backward(at::TensorList douts, const Tensor& k, const Tensor& rate,
                                     const Tensor& k_k, const Tensor& k_a, int64_t heads,
                                     double eps, bool of_weights) {
  TORCH_CHECK(douts.size() == 3, "removal_backward: a gradient for each result");
  return run(cpu_kernels().removal_backward, {k, rate, douts[0], douts[1], douts[2]}, {k_k, k_a},
             heads, eps, 2, of_weights);
}

Tensor bonus_norm(at::TensorList rows, at::TensorList weights, int64_t heads, double eps) {
  TORCH_CHECK(rows.size() == 5 && weights.size() == 3, "bonus_norm: y, r, k, v, gate and weights");
  return run(cpu_kernels().bonus_norm, rows, weights, heads, eps, 1, false)[0];
}

std::vector<Tensor> bonus_norm_backward(const Tensor& dout, at::TensorList rows,
                                        at::TensorList weights, int64_t heads, double eps,
                                        bool of_weights) {
  TORCH_CHECK(rows.size() == 5 && weights.size() == 3, "bonus_norm: y, r, k, v, gate and weights");
  std::vector<Tensor> all = rows.vec();
  all.push_back(dout);
  return run(cpu_kernels().bonus_norm_backward, all, weights, heads, eps, 5, of_weights);
}

}  // namespace
}  // namespace finchtune

TORCH_LIBRARY_IMPL(finchtune, CPU, library) {
  library.impl("value_residual", &finchtune::value_residual);
  library.impl("value_residual_backward", &finchtune::value_residual_backward);
  library.impl("removal", &finchtune::removal);
  library.impl("removal_backward", &finchtune::removal_backward);
  library.impl("bonus_norm", &finchtune::bonus_norm);
  library.impl("bonus_norm_backward", &finchtune::bonus_norm_backward);
}

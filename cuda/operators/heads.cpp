// The operators of heads.h: every check, and all memory.

#include "heads.h"

#include <ATen/ops/empty.h>

#include "dense.h"

namespace finchtune {
namespace {

using at::Tensor;
using std::vector;

// One kernel on rows and weights: `n_out` results as the rows and, if wanted, the weights' gradients.
vector<Tensor> run(HeadKernel kernel, const vector<Tensor>& rows, at::TensorList weights,
                   int64_t heads, double eps, int n_out, bool of_weights) {
  HeadCall call = {kernel, heads, static_cast<float>(eps)};
  const Tensor& first = rows[0];
  const auto alike = [&](const Tensor& x) {
    return x.scalar_type() == first.scalar_type() && x.device() == first.device();
  };
  TORCH_CHECK(first.dim() == 2 && heads > 0 && first.size(1) % heads == 0,
              "heads: rows must be (tokens, heads * size), not ", first.sizes());
  for (const Tensor& x : rows) {
    TORCH_CHECK(x.sizes() == first.sizes() && alike(x), "heads: rows must be alike");
    call.rows.push_back(dense(x));
  }
  for (const Tensor& x : weights) {
    TORCH_CHECK(x.numel() == first.size(1) && alike(x),
                "heads: a weight has a value for each channel, of the rows' dtype");
    call.weights.push_back(dense(x));
  }
  for (int i = 0; i < n_out; ++i) call.out.push_back(at::empty(first.sizes(), first.options()));
  if (of_weights)
    call.of_weights = at::empty({static_cast<int64_t>(weights.size()), first.size(1)},
                                first.options().dtype(at::kFloat));
  run_heads(call);
  if (of_weights) call.out.push_back(call.of_weights);
  return call.out;
}

vector<Tensor> joined(std::initializer_list<at::TensorList> lists) {
  vector<Tensor> all;
  for (at::TensorList list : lists) all.insert(all.end(), list.begin(), list.end());
  return all;
}

// rows k, rate, decay; values v, first, mix, or none where v stays as it is; weights k_k, k_a.
vector<Tensor> wkv7_inputs(at::TensorList rows, at::TensorList values, at::TensorList weights,
                           int64_t heads, double eps) {
  TORCH_CHECK(rows.size() == 3 && (values.empty() || values.size() == 3) && weights.size() == 2,
              "wkv7_inputs: k, rate, decay; v, first, mix or none; k_k, k_a");
  return run(HeadKernel::kWkv7Inputs, joined({rows, values}), weights, heads, eps,
             values.empty() ? 4 : 5, false);
}

vector<Tensor> wkv7_inputs_backward(at::TensorList douts, at::TensorList rows,
                                    at::TensorList values, at::TensorList weights, int64_t heads,
                                    double eps, bool of_weights) {
  TORCH_CHECK(rows.size() == 3 && (values.empty() || values.size() == 3) && weights.size() == 2 &&
                  douts.size() == (values.empty() ? 4 : 5),
              "wkv7_inputs_backward: a gradient for each result, and its inputs");
  return run(HeadKernel::kWkv7InputsBackward,
             joined({rows, douts.slice(0, 4), values, douts.slice(4)}), weights, heads, eps,
             values.empty() ? 3 : 6, of_weights);
}

// rows y, r, k, v, gate; weights weight, bias, r_k.
Tensor bonus_norm(at::TensorList rows, at::TensorList weights, int64_t heads, double eps) {
  TORCH_CHECK(rows.size() == 5 && weights.size() == 3, "bonus_norm: y, r, k, v, gate and weights");
  return run(HeadKernel::kBonusNorm, rows.vec(), weights, heads, eps, 1, false)[0];
}

vector<Tensor> bonus_norm_backward(const Tensor& dout, at::TensorList rows, at::TensorList weights,
                                   int64_t heads, double eps, bool of_weights) {
  TORCH_CHECK(rows.size() == 5 && weights.size() == 3, "bonus_norm: y, r, k, v, gate and weights");
  return run(HeadKernel::kBonusNormBackward, joined({rows, dout}), weights, heads, eps, 5,
             of_weights);
}

}  // namespace

void add_head_operators(torch::Library& library) {
  library.impl("wkv7_inputs", &wkv7_inputs);
  library.impl("wkv7_inputs_backward", &wkv7_inputs_backward);
  library.impl("bonus_norm", &bonus_norm);
  library.impl("bonus_norm_backward", &bonus_norm_backward);
}

}  // namespace finchtune

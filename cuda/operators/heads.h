// The operators of RWKV-7's parts around WKV7, the same on every device but for how kernels run.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <vector>

namespace finchtune {

enum class HeadKernel { kWkv7Inputs, kWkv7InputsBackward, kBonusNorm, kBonusNormBackward };

// Rows (tokens, heads * size), results alike, and weights (heads * size): dense, of one dtype.
struct HeadCall {
  HeadKernel kernel;
  int64_t heads;
  float eps;
  std::vector<at::Tensor> rows, weights, out;
  at::Tensor
      of_weights;  // the gradients of the weights (weights, heads * size) in fp32, or undefined

  int64_t tokens() const { return rows[0].size(0); }
  int64_t channels() const { return rows[0].size(1); }
};

// Runs a call where its tensors are; each library has its own.
void run_heads(const HeadCall& call);

template <typename Pointer>
std::vector<Pointer> pointers(const std::vector<at::Tensor>& tensors) {
  std::vector<Pointer> all;
  for (const at::Tensor& x : tensors) all.push_back(static_cast<Pointer>(x.data_ptr()));
  return all;
}

// Adds the operators to a library of one device's.
void add_head_operators(torch::Library& library);

}  // namespace finchtune

// What RWKV-7 does to a token's heads before and after WKV7: arguments of their kernels.
#pragma once

#include "element.h"

namespace finchtune {

// Rows are tokens of n_heads * head_size channels; weights have a value for each channel.
struct HeadParts {
  int64_t n_tokens, n_heads, head_size, n_rows;
  float eps;
  Element element;          // of rows, weights and results
  const void* const* rows;  // n_rows, in the order that a kernel names them in
  const void* const* weights;
  void* const* out;
  float* of_weights;  // their gradients (weights, channels); null for none
};

}  // namespace finchtune

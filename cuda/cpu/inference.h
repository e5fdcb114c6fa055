// Arguments of the kernels that only inference calls.
#pragma once

#include "element.h"

namespace finchtune {

enum class Activation : int64_t { kNone = 0, kTanh = 1, kSquaredRelu = 2 };

// y = activation(x W^T). An element of y depends on its row of x and its row of W alone, to the last
// bit: not on how many rows there are, nor on how the work is shared out.
struct Product {
  int64_t n_rows, n_in, n_out;
  Element element;  // of W and y
  const float* x;   // (n_rows, n_in), rows x_stride apart
  int64_t x_stride;
  const void* W;  // (n_out, n_in)
  void* y;        // (n_rows, n_out)
  Activation activation;
};

constexpr int64_t kProductOuts = 16;  // columns of y that are a piece of work

// One token for each of n_rows sequences: y, and the state moved on in place.
struct Wkv6Step {
  int64_t n_heads, head_size;
  Element element;  // of r, k, v, w, y: (n_rows, n_heads, head_size)
  const void *r, *k, *v, *w;
  const float* u;  // (n_heads, head_size)
  float* state;    // (n_rows, n_heads, head_size key, head_size value)
  void* y;
};

}  // namespace finchtune

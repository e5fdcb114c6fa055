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
  int64_t first_out = 0;  // the row of the whole weight that W begins with
};

// What a code stands for: a whole number from -128 on, one of a table of 256 values, or of 16; then
// a byte holds two, the first in its upper half.
enum class Coding { kInteger, kByte, kHalfByte };

// The same with a W that is kept as codes. Its elements, row by row, stand in blocks of 64 that
// share a scale, by which what their codes stand for is multiplied; the last block is filled up.
struct CodedProduct {
  Product product;  // W is not set
  Coding coding;
  const uint8_t* codes;  // (blocks, 64), or (blocks, 32)
  const float* scales;   // (blocks)
  const float* table;
};

constexpr int64_t kProductOuts = 16;  // columns of y that are a piece of work
constexpr int64_t kCodedBlock = 64;

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

// WKV7 on a CPU: the arguments of the kernel. The caller owns the memory.
#pragma once

#include "wkv.h"

namespace finchtune {

struct Wkv7Inputs {
  const void *r, *k, *v, *w, *a, *b;
  const float* state;  // (n_sequences, n_heads, head_size value, head_size key)
};

struct Wkv7Gradients {
  void *r, *k, *v, *w, *a, *b;
  float* state;
};

}  // namespace finchtune

// WKV6 on a CPU: the arguments of the kernel. The caller owns the memory.
#pragma once

#include "wkv.h"

namespace finchtune {

struct Wkv6Inputs {
  const void *r, *k, *v, *w;
  const float* u;      // (n_heads, head_size)
  const float* state;  // (n_sequences, n_heads, head_size key, head_size value)
};

struct Wkv6Gradients {
  void *r, *k, *v, *w;
  float* u;  // (n_sequences, n_heads, head_size): one share for each sequence, to be added up
  float* state;
};

}  // namespace finchtune

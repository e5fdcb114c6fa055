// The element-wise parts of a block of the model: arguments of their kernels. Rows are tokens, and
// the tokens of all sequences follow one another.
#pragma once

#include "element.h"

namespace finchtune {

// Blends of each token x_t (tokens, n_channels) with the one before it, p_t:
//   out_j = x + (p - x) (maa_j + blend_j),      j < n_mixtures
struct TokenMix {
  int64_t n_sequences;
  const int64_t* bounds;  // n_sequences + 1 token positions: where each sequence starts and ends
  int64_t n_channels, n_mixtures;
  Element element;
  const void* x;
  const void* before;     // rows that precede each sequence,
  int64_t before_stride;  // this many elements apart: 0 where all have the same
  const void* maa;        // (n_mixtures, n_channels)
  void* const* blends;    // n_mixtures of (tokens, n_channels), null for none
};

struct TokenMixGradients {
  const void* const* out;  // n_mixtures of (tokens, n_channels)
  void *sum, *blended;     // (tokens, n_channels): sum_j dout_j, sum_j dout_j (maa_j + blend_j)
  float* maa;              // (n_mixtures, n_channels), null for none; those of blends replace them
};

// What x gets from the two sums, with what the mixture of one maa passed back added to them:
//   s = sum + more,  b = blended + more maa;   dx_t = s_t - b_t + b_{t+1},  dbefore = b_first
struct ShiftGradients {
  const void *sum, *blended;
  const void *more, *maa;  // (tokens, n_channels), (n_channels); both null for none
  void *x, *before;        // before: (n_sequences, n_channels), null for none
};

// (normalise(y) weight + bias) silu(gate), with y normalised over each group of its channels.
struct GatedNorm {
  int64_t n_tokens, n_groups, group_size;
  float eps;
  Element element;
  const void *y, *gate;       // (n_tokens, n_groups * group_size)
  const void *weight, *bias;  // (n_groups * group_size)
};

struct GatedNormGradients {
  const void* out;
  void *y, *gate;
  float *weight, *bias;  // null for none
};

}  // namespace finchtune

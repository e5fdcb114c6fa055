/* The CUDA launchers of what RWKV-7 does to a token's heads before and after WKV7: plain C, no torch
 * header. Memory, dtypes, streams and errors as in elementwise.h. */
#pragma once

#include "elementwise.h"

#ifdef __cplusplus
extern "C" {
#endif

/* n_rows tensors (tokens, heads * size), n_weights of (heads * size), n_out results as the rows, in
 * the order that a launcher names them in. */
typedef struct {
  int64_t tokens, heads, size;
  float eps;
  int32_t dtype, n_rows, n_weights, n_out;
  const void* const* rows;
  const void* const* weights;
  void* const* out;
} Heads;

/* Rows k, rate, decay and, unless v stays as it is, v, first, mix; weights k_k, k_a. With kk = k k_k
 * brought to length 1 (which counts as no less than eps) and s = sigmoid(rate): k (1 + (s - 1) k_a),
 * log sigmoid(decay) - 1/2, -kk, kk s, and v + (first - v) sigmoid(mix). */
int finchtune_wkv7_inputs(const Heads* heads, void* stream);
/* Rows k, rate, decay, the gradients of the first four results and, unless v stays as it is, v, first,
 * mix and the gradient of the last -> those of k, rate, decay, v, first, mix. */
int finchtune_wkv7_inputs_backward(const Heads* heads, float* dweights, void* scratch,
                                   void* stream);

/* Rows y, r, k, v, gate, weights weight, bias, r_k: (normalised(y) weight + bias + v sum(r k r_k))
 * gate, y normalised and the sum taken over each head. */
int finchtune_bonus_norm(const Heads* heads, void* stream);
/* Rows as above and the gradient of the result -> those of the rows. */
int finchtune_bonus_norm_backward(const Heads* heads, float* dweights, void* scratch, void* stream);

/* Of a backward, whose dweights (n_weights, heads * size) fp32 are not NULL. */
size_t finchtune_heads_scratch_bytes(const Heads* heads);

#ifdef __cplusplus
}
#endif

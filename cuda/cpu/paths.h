// The CPU kernels and the instruction sets they are compiled for. No torch here: the caller owns
// the memory and shares the work out among its threads, each from a first up to a last item.
#pragma once

#include "block.h"
#include "heads.h"
#include "inference.h"
#include "wkv6.h"
#include "wkv7.h"

namespace finchtune {

// Rows (n_tokens, n_shards * r), cut into shards of r channels with an r x r matrix each.
struct Shards {
  int64_t n_tokens, n_shards, r;
  Element element;
  // Floats in a row of a matrix (r, r): whole vectors, in which zeros follow on r numbers.
  int64_t width() const { return (r + 15) / 16 * 16; }
};

struct CpuKernels {
  // Heads are numbered over all sequences, as sequence * n_heads + head; no two calls may share one.
  void (*wkv6_forward)(const WkvShape&, const Wkv6Inputs&, const WkvOutputs&, int64_t first,
                       int64_t last);
  void (*wkv6_backward)(const WkvShape&, const Wkv6Inputs&, const float* checkpoints,
                        const WkvOutputGradients&, const Wkv6Gradients&, int64_t first,
                        int64_t last);
  void (*wkv7_forward)(const WkvShape&, const Wkv7Inputs&, const WkvOutputs&, int64_t first,
                       int64_t last);
  void (*wkv7_backward)(const WkvShape&, const Wkv7Inputs&, const float* checkpoints,
                        const WkvOutputGradients&, const Wkv7Gradients&, int64_t first,
                        int64_t last);
  // Rows of logits (rows, n): the loss of each against its label, and its gradient in the place of
  // the logits, with l2wrap times the largest logit added at that one's.
  void (*cross_entropy)(void* logits, Element element, int64_t n, const int64_t* labels,
                        float l2wrap, float* losses, int64_t first, int64_t last);
  // Rows of x (rows, k): sums (rows, r) of its shards of r columns, the last of which may be
  // narrower; and s (rows, r) added to each shard.
  void (*shard_sums)(const void* x, Element element, int64_t k, int64_t r, void* sums,
                     Element of_sums, int64_t first, int64_t last);
  void (*add_to_shards)(void* x, Element element, int64_t k, const void* s, Element of_s, int64_t r,
                        int64_t first, int64_t last);
  // Tokens: moved = x + u with u_b = D_b x_b, and the sums (n_tokens, r) of the u_b. Takes the D_b
  // transposed, in rows of width().
  void (*bat_row_forward)(const Shards&, const void* x, const float* D, void* moved, float* sums,
                          int64_t first, int64_t last);
  // Shards b, with q_b = dx_b + sums: dD_b = q_b^T x_b, and q_b D_b added to dx_b. D in rows of
  // width(), dD (n_shards, r, r) dense.
  void (*bat_row_backward)(const Shards&, void* dx, const void* x, const float* D,
                           const float* sums, void* dD, int64_t first, int64_t last);
  // Bands of channels.
  void (*token_mix)(const TokenMix&, void* const* out, int64_t first, int64_t last);
  void (*token_mix_backward)(const TokenMix&, const TokenMixGradients&, int64_t first,
                             int64_t last);
  void (*shift_backward)(const TokenMix&, const ShiftGradients&, int64_t first, int64_t last);
  // Groups of channels.
  void (*gated_norm)(const GatedNorm&, void* out, int64_t first, int64_t last);
  void (*gated_norm_backward)(const GatedNorm&, const GatedNormGradients&, int64_t first,
                              int64_t last);
  // Elements: relu(x)^2 and its gradient from the result; sigmoid(gate) y and its gradients.
  void (*squared_relu)(Element, const void* x, void* y, int64_t first, int64_t last);
  void (*squared_relu_backward)(Element, const void* y, const void* dy, void* dx, int64_t first,
                                int64_t last);
  void (*sigmoid_gate)(Element, const void* gate, const void* y, void* out, int64_t first,
                       int64_t last);
  void (*sigmoid_gate_backward)(Element, const void* gate, const void* y, const void* dout,
                                void* dgate, void* dy, int64_t first, int64_t last);
  // Heads, in all tokens; head_parts.h says which rows and weights each takes.
  void (*wkv7_inputs)(const HeadParts&, int64_t first, int64_t last);
  void (*wkv7_inputs_backward)(const HeadParts&, int64_t first, int64_t last);
  void (*bonus_norm)(const HeadParts&, int64_t first, int64_t last);
  void (*bonus_norm_backward)(const HeadParts&, int64_t first, int64_t last);
  // Pieces of kProductOuts columns of y; heads, numbered as row * n_heads + head.
  void (*product)(const Product&, int64_t first, int64_t last);
  void (*coded_product)(const CodedProduct&, int64_t first, int64_t last);
  void (*wkv6_step)(const Wkv6Step&, int64_t first, int64_t last);
};

struct CpuPath {
  const char* name;
  bool (*supported)();
  CpuKernels kernels;
};

// All compiled forms, the fastest first; the last runs everywhere.
extern const CpuPath kCpuPaths[];
extern const int kCpuPathCount;

}  // namespace finchtune

/* The CUDA launchers of a block's element-wise parts, of Bone's and Bat's shards, of unpacking
 * quantised weights and of the cross entropy: plain C, no torch header.
 *
 * All tensors are contiguous device memory of ElementwiseDtype unless said otherwise; sums are made
 * in fp32 and what is stored is rounded. Tensors that begin at a multiple of 16 bytes, with rows of
 * whole 16 bytes, move in pieces of that size; others element by element. Each launcher enqueues its
 * kernels on `stream` (a cudaStream_t) of the current device and returns a cudaError_t as int. None
 * synchronises, none uses atomics: the same inputs give the same bits.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum ElementwiseDtype { ELEMENTWISE_FP32 = 0, ELEMENTWISE_BF16 = 1, ELEMENTWISE_FP16 = 2 };
enum { MOST_MIXTURES = 8 };

/* The tokens of all sequences, one after another. */
typedef struct {
  int64_t rows, channels;
  int64_t n_seq, length;     /* sequences of `length` tokens, where they are not packed */
  const int32_t* cu_seqlens; /* NULL; or n_seq + 1 rising offsets from 0 to rows */
  int32_t dtype;
} Shift;

/* out_j = x + (p - x) (maa_j + blend_j) for j < n, with p the token before x: in its sequence, or
 * `before` (n_seq, channels), NULL for zeros. x (rows, channels), maa (n, channels), blends NULL or
 * n of (rows, channels), which may be the outputs. */
int finchtune_token_mix(const Shift* shift, int n, const void* x, const void* before,
                        const void* maa, const void* const* blends, void* const* out, void* stream);

/* sum = sum_j dout_j, blended = sum_j dout_j (maa_j + blend_j); each blend is replaced by its own
 * gradient dout_j (p - x); dmaa (n, channels) fp32, NULL if not wanted, its sum over the rows.
 * scratch: as many bytes as asked for, where dmaa is wanted. */
size_t finchtune_token_mix_scratch_bytes(const Shift* shift, int n);
int finchtune_token_mix_backward(const Shift* shift, int n, const void* x, const void* before,
                                 const void* maa, const void* const* dout, void* const* blends,
                                 void* sum, void* blended, float* dmaa, void* scratch,
                                 void* stream);

/* With s = sum + more and b = blended + more maa: dx_t = s_t - b_t + b_{t+1}, the last of its
 * sequence alone, and dbefore (n_seq, channels), NULL if not wanted, b of each first token; rows of
 * empty sequences are not written. more and maa (1, channels) may be NULL. */
int finchtune_shift_backward(const Shift* shift, const void* sum, const void* blended,
                             const void* more, const void* maa, void* dx, void* dbefore,
                             void* stream);

/* out = (normalised(y) weight + bias) silu(gate), y normalised over each of `groups` groups of `size`
 * channels. y, gate (rows, groups * size), weight, bias (groups * size). */
typedef struct {
  int64_t rows, groups, size;
  float eps;
  int32_t dtype;
  const void *y, *gate, *weight, *bias;
} GatedNorm;
int finchtune_gated_norm(const GatedNorm* norm, void* out, void* stream);
/* dparameters (2, groups * size) fp32, of weight and bias, NULL if not wanted; else scratch of as
 * many bytes as asked for. */
size_t finchtune_gated_norm_scratch_bytes(const GatedNorm* norm);
int finchtune_gated_norm_backward(const GatedNorm* norm, const void* dout, void* dy, void* dgate,
                                  float* dparameters, void* scratch, void* stream);

/* Element by element: y = relu(x)^2, dx = 2 sqrt(y) dy; out = sigmoid(gate) y and its gradients. */
int finchtune_squared_relu(int dtype, int64_t count, const void* x, void* y, void* stream);
int finchtune_squared_relu_backward(int dtype, int64_t count, const void* dy, const void* y,
                                    void* dx, void* stream);
int finchtune_sigmoid_gate(int dtype, int64_t count, const void* gate, const void* y, void* out,
                           void* stream);
int finchtune_sigmoid_gate_backward(int dtype, int64_t count, const void* dout, const void* gate,
                                    const void* y, void* dgate, void* dy, void* stream);

/* Rows of k channels in shards of r; the last may be narrower.
 * sums (rows, r), in their own dtype: of the shards of x. */
int finchtune_shard_sums(int dtype, int dtype_of_sums, int64_t rows, int64_t k, int64_t r,
                         const void* x, void* sums, void* stream);
/* x += s (rows, r), of x's dtype or fp32, on every shard. */
int finchtune_add_to_shards(int dtype, int dtype_of_s, int64_t rows, int64_t k, int64_t r, void* x,
                            const void* s, void* stream);
/* moved = x + u and sums (rows, r) fp32 of u over the shards; x, moved (rows, n r), u (n, rows, r). */
int finchtune_move_shards(int dtype, int64_t rows, int64_t n, int64_t r, const void* x,
                          const void* u, void* moved, float* sums, void* stream);
/* q (n, rows, r) = dx (rows, n r) + sums (rows, r) fp32 on every shard. */
int finchtune_gather_shards(int dtype, int64_t rows, int64_t n, int64_t r, const void* dx,
                            const float* sums, void* q, void* stream);

/* The first `count` elements of a weight quantised in blocks of 64 with a scale each: two codes of
 * `table` (16 values) a byte, the first in the upper half; whole numbers; or e4m3 numbers. */
enum UnpackKind { UNPACK_TABLE = 0, UNPACK_INT8 = 1, UNPACK_E4M3 = 2 };
typedef struct {
  float value[16];
} UnpackTable;
int finchtune_unpack(int dtype, int kind, const UnpackTable* table, int64_t count,
                     const void* codes, const float* scales, void* out, void* stream);

/* losses (rows) fp32 = -log softmax(logits)[label]; logits (rows, n) become their gradient, with
 * l2wrap times each row's largest logit added at its place. A label outside gives NaN. */
int finchtune_cross_entropy(int dtype, int64_t rows, int64_t n, void* logits, const int64_t* labels,
                            float l2wrap, float* losses, void* stream);

#ifdef __cplusplus
}
#endif

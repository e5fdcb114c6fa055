/* The CUDA launchers of the WKV6 operator: plain C, no torch header.
 *
 *   y_t     = r_t (S_t + diag(u) k_t^T v_t)
 *   S_{t+1} = diag(exp(-exp(w_t))) S_t + k_t^T v_t          (RWKV-6, arXiv:2404.05892)
 *
 * Layouts, all contiguous, all device memory:
 *   r, k, v, w, y and their gradients   (B, T, H, N)    Wkv6Problem.dtype
 *   u, du                               (H, N)          fp32
 *   states and their gradients          (sequences, H, N key, N value)   fp32
 * The (B, T, H, N) tensors and the checkpoints must start at a multiple of 16 bytes, the rest at
 * a multiple of 4.
 *
 * Each launcher enqueues its kernels on `stream` (a cudaStream_t) of the current device and returns
 * a cudaError_t as int: 0, or why the launch failed. It never synchronises.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum Wkv6Dtype { WKV6_FP32 = 0, WKV6_BF16 = 1, WKV6_FP16 = 2 };

typedef struct {
  int64_t B, T, H, N;        /* T >= 1; N a multiple of 8, from 8 to 128 */
  int32_t dtype;             /* Wkv6Dtype */
  int64_t n_seq;             /* sequences: B, or the packed ones when cu_seqlens is given */
  const int32_t* cu_seqlens; /* NULL; or, with B = 1, n_seq + 1 rising offsets from 0 to T */
} Wkv6Problem;

/* How many states of every head the forward keeps for the backward, and the bytes of all. */
int64_t wkv6_checkpoint_count(const Wkv6Problem* problem);
size_t wkv6_checkpoint_bytes(const Wkv6Problem* problem);

/* Bytes of the temporary buffer of one launch; 0 means that NULL may be passed. They depend on the
 * current device. */
size_t wkv6_forward_scratch_bytes(const Wkv6Problem* problem);
size_t wkv6_backward_scratch_bytes(const Wkv6Problem* problem);

/* How the tensor-core kernels share a problem out among so many thread blocks that run at the same
 * time: the first `whole` heads are not cut, the others into `per_head` segments of `length` tokens.
 */
void wkv6_schedule(const Wkv6Problem* problem, int64_t places, int64_t* length, int64_t* whole,
                   int64_t* per_head);

/* state_in: NULL for zero states. state_out: NULL if not wanted. checkpoints: NULL when no backward
 * will follow. y must not overlap an input. */
int wkv6_forward(const Wkv6Problem* problem, const void* r, const void* k, const void* v,
                 const void* w, const float* u, const float* state_in, void* y, float* state_out,
                 void* checkpoints, void* scratch, void* stream);

/* Gradients, given dy and the gradient of the final state. checkpoints: as the forward of the same
 * problem left them (they hold the initial state too). dstate_out: NULL for zero. dstate_in: NULL
 * if not wanted. dr, dk, dv, dw have the dtype of the inputs. The same inputs give the same bits. */
int wkv6_backward(const Wkv6Problem* problem, const void* r, const void* k, const void* v,
                  const void* w, const float* u, const void* dy, const float* dstate_out,
                  const void* checkpoints, void* dr, void* dk, void* dv, void* dw, float* du,
                  float* dstate_in, void* scratch, void* stream);

/* The text of an error code that a launcher returned. */
const char* wkv6_error_string(int error);

#ifdef __cplusplus
}
#endif

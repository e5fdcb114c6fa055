/* The CUDA launchers of the WKV7 operator: plain C, no torch header.
 *
 *   S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T     d_t = exp(-exp(w_t))
 *   y_t = S_t r_t                                                 (RWKV-7, arXiv:2503.14456)
 *
 * A problem is described as WKV6's. Layouts, all contiguous, all device memory:
 *   r, k, v, w, a, b, y and their gradients   (B, T, H, N)    Wkv6Problem.dtype
 *   states, their gradients and checkpoints   (sequences, H, N value, N key)   fp32
 *
 * Each launcher enqueues its kernel on `stream` (a cudaStream_t) of the current device and returns
 * a cudaError_t as int: 0, or why the launch failed. It never synchronises.
 */
#pragma once

#include "wkv6.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How many states of every head the forward saves for the backward, and the bytes of all. */
int64_t wkv7_checkpoint_count(const Wkv6Problem* problem);
size_t wkv7_checkpoint_bytes(const Wkv6Problem* problem);

/* Bytes of the temporary buffer of a backward. They depend on the current device. */
size_t wkv7_backward_scratch_bytes(const Wkv6Problem* problem);

/* rows: r, k, v, w, a, b. state_in: NULL for zero states. state_out: NULL if not wanted.
 * checkpoints: NULL when no backward will follow. y must not overlap an input. */
int wkv7_forward(const Wkv6Problem* problem, const void* const* rows, const float* state_in,
                 void* y, float* state_out, float* checkpoints, void* stream);

/* Gradients of rows, in the same order, given dy and the gradient of the final state. checkpoints:
 * as the forward of the same problem left them (they hold the initial state too). dstate_out: NULL
 * for zero. dstate_in: NULL if not wanted. The same inputs give the same bits. */
int wkv7_backward(const Wkv6Problem* problem, const void* const* rows, const void* dy,
                  const float* dstate_out, const float* checkpoints, void* const* gradients,
                  float* dstate_in, void* scratch, void* stream);

/* The text of an error code that a launcher returned. */
const char* wkv7_error_string(int error);

#ifdef __cplusplus
}
#endif

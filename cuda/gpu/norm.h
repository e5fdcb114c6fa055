/* Launchers of layer norm joined with the residual sum before it. No dependency on torch.
 *
 * All tensors are dense; dtypes are those of elementwise.h. Each launcher puts its kernels on
 * `stream` (a cudaStream_t) of the current device and returns a cudaError_t. Every sum is made in
 * one order. */
#ifndef FINCHTUNE_NORM_H_
#define FINCHTUNE_NORM_H_

#include "elementwise.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MOST_NORM_BYTES = 24000 }; /* of a row: two of them fit what every GPU has */

typedef struct {
  int64_t rows, channels;
  float eps;
  int32_t dtype;
} LayerNorm;

/* total = x + y, normed = (total - mean) / standard deviation * weight + bias over each row;
 * moments (rows, 2) fp32 are its mean and 1 / standard deviation. Without y (NULL) total is x, and
 * is not written. */
int finchtune_added_norm(const LayerNorm* norm, const void* x, const void* y, const void* weight,
                         const void* bias, void* total, void* normed, float* moments, void* stream);
/* dx = the gradient of total: through normed, and dtotal unless NULL. It is that of x and of y.
 * dparameters (2, channels) fp32, of weight and bias, NULL if not wanted; else scratch of as many
 * bytes as asked for. */
size_t finchtune_added_norm_scratch_bytes(const LayerNorm* norm);
int finchtune_added_norm_backward(const LayerNorm* norm, const void* total, const float* moments,
                                  const void* weight, const void* dnormed, const void* dtotal,
                                  void* dx, float* dparameters, void* scratch, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* FINCHTUNE_NORM_H_ */

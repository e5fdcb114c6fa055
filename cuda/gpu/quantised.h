/* Launchers of the kernels that read or make codes of few bits beside a product. No dependency on
 * torch.
 *
 * All tensors are dense and begin at multiples of 16 bytes; dtypes are those of elementwise.h. Each
 * launcher puts its kernel on `stream` (a cudaStream_t) of the current device and returns a
 * cudaError_t. Nothing depends on the order in which thread blocks run. */
#ifndef FINCHTUNE_QUANTISED_H_
#define FINCHTUNE_QUANTISED_H_

#include "elementwise.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MOST_CODED_ROWS = 8 };

/* y (rows, n_out) = x W^T for x (rows, n_in), at most MOST_CODED_ROWS of them, and a weight
 * (n_out, n_in) as finchtune_unpack takes it; n_in a multiple of 32. The weight's values and all
 * sums are fp32. */
int finchtune_coded_product(int dtype, int kind, const UnpackTable* table, int64_t rows,
                            int64_t n_in, int64_t n_out, const void* x, const void* codes,
                            const float* scales, void* y, void* stream);

/* The rows of x (rows, n), their columns times `factors` (n) fp32 unless NULL: each over scale =
 * its largest magnitude / 448, rounded to e4m3. codes (rows, n), scales (rows) fp32; n a multiple of
 * 16. A row with NaN or infinity gets such a scale. */
int finchtune_fp8_rows(int dtype, int64_t rows, int64_t n, const void* x, const float* factors,
                       void* codes, float* scales, void* stream);

/* Bytes (rows, columns) -> (columns, rows); both multiples of 16. */
int finchtune_turn_bytes(int64_t rows, int64_t columns, const void* from, void* to, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* FINCHTUNE_QUANTISED_H_ */

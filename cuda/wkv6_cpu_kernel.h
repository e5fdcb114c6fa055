// The CPU kernel, written once on GCC's vector types and included once for each instruction set,
// in a namespace that defines LANES, the number of floats in a register. See docs/kernels.md.
//
// Tokens are taken in chunks of kTokens. Inside a chunk each pair of tokens is weighed directly;
// what crosses a chunk goes through the state. With d the decays of a chunk's tokens:
//   before_i = product of d_l, l < i     after_j = product of d_l, l > j     kept = product of all
//   A_ij = sum_n r_i k_j prod(d_l, j < l < i) for j < i,      A_ii = sum_n r_i u k_i
//   y = A V + (r*before) S        S' = kept*S + (k*after)^T V
// Backward runs the chunks in reverse with G, the gradient of the state at the chunk's end. All
// factors are products of decays, so they lie in [0, 1]: no overflow, and no difference of large
// sums anywhere.

#include "wkv6_cpu_vector.h"
#include "wkv6_cpu_rows.h"
#include "wkv6_cpu_matrix.h"
#include "wkv6_cpu_chunk.h"
#include "wkv6_cpu_forward.h"
#include "wkv6_cpu_backward.h"
#include "wkv6_cpu_loss.h"

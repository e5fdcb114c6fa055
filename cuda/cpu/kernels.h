// All CPU kernels, written once on GCC's vector types and included once for each instruction set,
// in a namespace that defines LANES, the number of floats in a register.

#include "vector.h"
#include "memory.h"
#include "rows.h"
#include "matrix.h"
#include "chunk.h"
#include "wkv6_forward.h"
#include "wkv6_backward.h"
#include "wkv7_forward.h"
#include "wkv7_backward.h"
#include "cross_entropy.h"
#include "adapters.h"
#include "token_mix.h"
#include "activations.h"
#include "head_parts.h"
#include "product.h"
#include "wkv6_step.h"

constexpr CpuKernels kKernels = {
    wkv6_forward,
    wkv6_backward,
    wkv7_forward,
    wkv7_backward,
    cross_entropy,
    shard_sums,
    add_to_shards,
    bat_row_forward,
    bat_row_backward,
    token_mix,
    token_mix_backward,
    shift_backward,
    gated_norm,
    gated_norm_backward,
    squared_relu,
    squared_relu_backward,
    sigmoid_gate,
    sigmoid_gate_backward,
    wkv7_inputs,
    wkv7_inputs_backward,
    bonus_norm,
    bonus_norm_backward,
    product,
    coded_product,
    wkv6_step,
};

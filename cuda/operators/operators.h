// What the files of torch operators share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../cpu/paths.h"
#include "dense.h"

namespace finchtune {

// The kernels in the form that is in use: the fastest, unless another was chosen.
const CpuKernels& cpu_kernels();

// The dtype of a tensor for a CPU kernel. Refuses all but fp32 and bf16.
Element element_of(const at::Tensor& x);

// The token positions where sequences start and the last one ends: B of T tokens each, or those of
// cu_seqlens (integers on a CPU) packed into B = 1. Refuses boundaries that do not rise from 0 to T.
std::vector<int64_t> sequence_bounds(const std::optional<at::Tensor>& cu_seqlens, int64_t B,
                                     int64_t T);

}  // namespace finchtune

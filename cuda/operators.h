// What the files of torch operators share.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/paths.h"

namespace finchtune {

// The kernels in the form that is in use: the fastest, unless another was chosen.
const CpuKernels& cpu_kernels();

// The dtype of a tensor for a CPU kernel. Refuses all but fp32 and bf16.
Element element_of(const at::Tensor& x);

// The same values one after another, from an address that vector instructions can load from.
at::Tensor dense(const at::Tensor& x);

}  // namespace finchtune

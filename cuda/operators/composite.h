// Operators made of matrix products and of other operators, the same on every device: what is one
// call for Python and autograd.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace finchtune {

// Adds them to a library of one device's operators.
void add_composites(torch::Library& library);
void add_low_ranks(torch::Library& library);

// A gradient that is not wanted.
inline at::Tensor none(const at::Tensor& like) { return at::empty({0}, like.options()); }

}  // namespace finchtune

// Operators made of matrix products and of other operators, the same on every device: what is one
// call for Python and autograd.
#pragma once

#include <torch/library.h>

namespace finchtune {

// Adds them to a library of one device's operators.
void add_composites(torch::Library& library);

}  // namespace finchtune

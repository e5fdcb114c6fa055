#pragma once

#include <ATen/core/Tensor.h>

namespace finchtune {

// The same values one after another, from an address that vector instructions can load from.
inline at::Tensor dense(const at::Tensor& x) {
  at::Tensor y = x.contiguous();
  return reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 16 == 0 ? y : y.clone();
}

}  // namespace finchtune

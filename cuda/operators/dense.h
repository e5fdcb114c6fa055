#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace finchtune {

// The same values one after another, from an address that vector instructions can load from.
inline at::Tensor dense(const at::Tensor& x) {
  at::Tensor y = x.contiguous();
  return reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 16 == 0 ? y : y.clone();
}

inline std::optional<at::Tensor> dense(const std::optional<at::Tensor>& x) {
  return x ? std::optional<at::Tensor>(dense(*x)) : std::nullopt;
}

// The values of a tensor that may be left out; null then.
template <typename T>
const T* data_or_null(const std::optional<at::Tensor>& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

}  // namespace finchtune

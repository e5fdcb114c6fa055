// What the operators of WKV6 for the CPU and for the GPU share: the checked inputs.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <vector>

#include "dense.h"

namespace finchtune {

// What a call works on: the inputs made dense and checked against each other.
struct Call {
  at::Tensor r, k, v, w, u;
  std::optional<at::Tensor> state;  // none: zeros
  std::optional<at::Tensor> cu_seqlens;
  int64_t B, T, H, N, n_sequences;

  Call(const at::Tensor& r_, const at::Tensor& k_, const at::Tensor& v_, const at::Tensor& w_,
       const at::Tensor& u_, const std::optional<at::Tensor>& state_,
       const std::optional<at::Tensor>& cu_seqlens_)
      : r(dense(r_)), k(dense(k_)), v(dense(v_)), w(dense(w_)), u(dense(u_)), state(dense(state_)) {
    TORCH_CHECK(r.dim() == 4 && r.numel() > 0, "wkv6: r must be (B, T, H, N), not ", r.sizes());
    B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3);
    TORCH_CHECK(N % 8 == 0 && N <= 128, "wkv6: N must be a multiple of 8 up to 128, not ", N);
    n_sequences = B;
    if (cu_seqlens_) {
      cu_seqlens = cu_seqlens_->contiguous();
      TORCH_CHECK(B == 1 && cu_seqlens->dim() == 1 && cu_seqlens->numel() > 1 &&
                      cu_seqlens->scalar_type() == at::kInt && cu_seqlens->device() == r.device(),
                  "wkv6: cu_seqlens must be n+1 int32 boundaries beside r, with B = 1");
      n_sequences = cu_seqlens->numel() - 1;
    }
    for (const at::Tensor* x : {&k, &v, &w}) check(*x, r.sizes(), r.scalar_type());
    check(u, {H, N}, at::kFloat);
    if (state) check(*state, state_shape(), at::kFloat);
  }

  void check(const at::Tensor& x, at::IntArrayRef shape, at::ScalarType dtype) const {
    TORCH_CHECK(x.sizes() == shape && x.scalar_type() == dtype && x.device() == r.device(),
                "wkv6: expected ", shape, " ", dtype, " on ", r.device(), ", got ", x.sizes(), " ",
                x.scalar_type(), " on ", x.device());
  }

  std::vector<int64_t> state_shape() const { return {n_sequences, H, N, N}; }
  // The gradient of the state; empty where none was given.
  at::Tensor state_gradient() const { return state ? floats(state_shape()) : floats({0}); }

  at::Tensor like_r() const { return at::empty(r.sizes(), r.options()); }
  at::Tensor floats(at::IntArrayRef shape) const {
    return at::empty(shape, r.options().dtype(at::kFloat));
  }
};

}  // namespace finchtune

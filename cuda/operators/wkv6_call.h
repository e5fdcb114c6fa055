// What the operators of WKV6 for the CPU and for the GPU share: the checked inputs, and what they
// return. A device's own Call has `checkpoints(bool wanted)`, `forward(...)` and `backward(...)`.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>
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

// What a backward is given beside the inputs, and the gradients that it makes. du and dstate_in are
// left to the device.
struct Gradients {
  at::Tensor dy, checkpoints;
  std::optional<at::Tensor> dstate;
  at::Tensor dr, dk, dv, dw, du, dstate_in;

  Gradients(const Call& call, const at::Tensor& grad_y, const at::Tensor& checkpoints_,
            const std::optional<at::Tensor>& grad_state)
      : dy(dense(grad_y)), checkpoints(dense(checkpoints_)), dstate(dense(grad_state)) {
    call.check(dy, call.r.sizes(), call.r.scalar_type());
    if (dstate) call.check(*dstate, call.state_shape(), at::kFloat);
    for (at::Tensor* x : {&dr, &dk, &dv, &dw}) *x = call.like_r();
  }
};

template <typename DeviceCall>
std::tuple<at::Tensor, at::Tensor, at::Tensor> wkv6_forward(
    const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,
    const at::Tensor& u, const std::optional<at::Tensor>& state,
    const std::optional<at::Tensor>& cu_seqlens, bool for_backward) {
  const DeviceCall call(r, k, v, w, u, state, cu_seqlens);
  at::Tensor y = call.like_r(), new_state = call.floats(call.state_shape());
  at::Tensor checkpoints = call.checkpoints(for_backward);
  call.forward(y, new_state, for_backward ? checkpoints.data_ptr() : nullptr);
  return {y, new_state, checkpoints};
}

template <typename DeviceCall>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> wkv6_backward(
    const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,
    const at::Tensor& u, const std::optional<at::Tensor>& state,
    const std::optional<at::Tensor>& cu_seqlens, const at::Tensor& checkpoints,
    const at::Tensor& grad_y, const std::optional<at::Tensor>& grad_state) {
  const DeviceCall call(r, k, v, w, u, state, cu_seqlens);
  Gradients all(call, grad_y, checkpoints, grad_state);
  call.backward(all);
  return {all.dr, all.dk, all.dv, all.dw, all.du, all.dstate_in};
}

}  // namespace finchtune

// What the operators of WKV6 for the CPU and for the GPU share.
#pragma once

#include "wkv_call.h"

namespace finchtune {

struct Wkv6Call : WkvCall {
  at::Tensor u;

  Wkv6Call(const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,
           const at::Tensor& u_, const std::optional<at::Tensor>& state_,
           const std::optional<at::Tensor>& cu_seqlens_)
      : WkvCall({r, k, v, w}, state_, cu_seqlens_), u(dense(u_.to(at::kFloat))) {
    check(u, {H, N}, at::kFloat);
  }
};

// du is left to the device, as dstate_in.
struct Wkv6CallGradients : WkvGradients {
  using WkvGradients::WkvGradients;
  at::Tensor du;
};

template <typename DeviceCall>
std::tuple<at::Tensor, at::Tensor, at::Tensor> wkv6_forward(
    const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,
    const at::Tensor& u, const std::optional<at::Tensor>& state,
    const std::optional<at::Tensor>& cu_seqlens, bool for_backward) {
  return wkv_forward(DeviceCall(r, k, v, w, u, state, cu_seqlens), for_backward);
}

template <typename DeviceCall>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> wkv6_backward(
    const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,
    const at::Tensor& u, const std::optional<at::Tensor>& state,
    const std::optional<at::Tensor>& cu_seqlens, const at::Tensor& checkpoints,
    const at::Tensor& grad_y, const std::optional<at::Tensor>& grad_state) {
  const DeviceCall call(r, k, v, w, u, state, cu_seqlens);
  Wkv6CallGradients all(call, grad_y, checkpoints, grad_state);
  call.backward(all);
  return {all.rows[0], all.rows[1], all.rows[2], all.rows[3], all.du, all.dstate_in};
}

}  // namespace finchtune

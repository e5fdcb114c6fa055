// What the operators of WKV7 for the CPU and for the GPU share.
#pragma once

#include "wkv_call.h"

namespace finchtune {

struct Wkv7Call : WkvCall {
  Wkv7Call(const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,
           const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& state_,
           const std::optional<at::Tensor>& cu_seqlens_)
      : WkvCall({r, k, v, w, a, b}, state_, cu_seqlens_) {}
};

template <typename DeviceCall>
std::tuple<at::Tensor, at::Tensor, at::Tensor> wkv7_forward(
    const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,
    const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& state,
    const std::optional<at::Tensor>& cu_seqlens, bool for_backward) {
  return wkv_forward(DeviceCall(r, k, v, w, a, b, state, cu_seqlens), for_backward);
}

template <typename DeviceCall>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
wkv7_backward(const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w,
              const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& state,
              const std::optional<at::Tensor>& cu_seqlens, const at::Tensor& checkpoints,
              const at::Tensor& grad_y, const std::optional<at::Tensor>& grad_state) {
  const DeviceCall call(r, k, v, w, a, b, state, cu_seqlens);
  WkvGradients all(call, grad_y, checkpoints, grad_state);
  call.backward(all);
  return {all.rows[0], all.rows[1], all.rows[2],  all.rows[3],
          all.rows[4], all.rows[5], all.dstate_in};
}

}  // namespace finchtune

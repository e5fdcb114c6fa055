// What the WKV operators of all generations and devices share: the checked inputs, and what they
// return. A device's own call has `checkpoints(bool wanted)`, `forward(...)` and `backward(...)`.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>
#include <vector>

#include "dense.h"

namespace finchtune {

// What a call works on: the inputs made dense and checked against each other.
struct WkvCall {
  std::vector<at::Tensor> rows;     // r and the others of its shape, in the operator's order
  std::optional<at::Tensor> state;  // none: zeros
  std::optional<at::Tensor> cu_seqlens;
  int64_t B, T, H, N, n_sequences;

  WkvCall(at::TensorList given, const std::optional<at::Tensor>& state_,
          const std::optional<at::Tensor>& cu_seqlens_)
      : state(dense(state_)) {
    for (const at::Tensor& x : given) rows.push_back(dense(x));
    TORCH_CHECK(r().dim() == 4 && r().numel() > 0, "wkv: r must be (B, T, H, N), not ",
                r().sizes());
    B = r().size(0), T = r().size(1), H = r().size(2), N = r().size(3);
    TORCH_CHECK(N % 8 == 0 && N <= 128, "wkv: N must be a multiple of 8 up to 128, not ", N);
    n_sequences = B;
    if (cu_seqlens_) {
      cu_seqlens = cu_seqlens_->contiguous();
      TORCH_CHECK(B == 1 && cu_seqlens->dim() == 1 && cu_seqlens->numel() > 1 &&
                      cu_seqlens->scalar_type() == at::kInt && cu_seqlens->device() == r().device(),
                  "wkv: cu_seqlens must be n+1 int32 boundaries beside r, with B = 1");
      n_sequences = cu_seqlens->numel() - 1;
    }
    for (const at::Tensor& x : rows) check_row(x);
    if (state) check_state(*state);
  }

  const at::Tensor& r() const { return rows[0]; }
  const void* row(int i) const { return rows[i].const_data_ptr(); }

  void check(const at::Tensor& x, at::IntArrayRef shape, at::ScalarType dtype) const {
    TORCH_CHECK(x.sizes() == shape && x.scalar_type() == dtype && x.device() == r().device(),
                "wkv: expected ", shape, " ", dtype, " on ", r().device(), ", got ", x.sizes(), " ",
                x.scalar_type(), " on ", x.device());
  }
  void check_row(const at::Tensor& x) const { check(x, r().sizes(), r().scalar_type()); }
  void check_state(const at::Tensor& x) const { check(x, state_shape(), at::kFloat); }

  std::vector<int64_t> state_shape() const { return {n_sequences, H, N, N}; }
  // The gradient of the state; empty where none was given.
  at::Tensor state_gradient() const { return state ? floats(state_shape()) : floats({0}); }

  at::Tensor like_r() const { return at::empty(r().sizes(), r().options()); }
  at::Tensor floats(at::IntArrayRef shape) const {
    return at::empty(shape, r().options().dtype(at::kFloat));
  }
};

// What a backward is given beside the inputs, and the gradients that it makes. dstate_in is left to
// the device.
struct WkvGradients {
  at::Tensor dy, checkpoints;
  std::optional<at::Tensor> dstate;
  std::vector<at::Tensor> rows;
  at::Tensor dstate_in;

  WkvGradients(const WkvCall& call, const at::Tensor& grad_y, const at::Tensor& checkpoints_,
               const std::optional<at::Tensor>& grad_state)
      : dy(dense(grad_y)), checkpoints(dense(checkpoints_)), dstate(dense(grad_state)) {
    call.check_row(dy);
    if (dstate) call.check_state(*dstate);
    for (size_t i = 0; i < call.rows.size(); ++i) rows.push_back(call.like_r());
  }

  void* row(int i) const { return rows[i].data_ptr(); }
};

template <typename DeviceCall>
std::tuple<at::Tensor, at::Tensor, at::Tensor> wkv_forward(const DeviceCall& call,
                                                           bool for_backward) {
  at::Tensor y = call.like_r(), new_state = call.floats(call.state_shape());
  at::Tensor checkpoints = call.checkpoints(for_backward);
  call.forward(y, new_state, for_backward ? checkpoints.data_ptr() : nullptr);
  return {y, new_state, checkpoints};
}

}  // namespace finchtune

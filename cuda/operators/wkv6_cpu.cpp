// The torch operators finchtune::wkv6_forward and wkv6_backward on a CPU: every check, all memory,
// and the calls into the kernels.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "operators.h"
#include "wkv6_call.h"

namespace finchtune {
namespace {

using at::Tensor;
using std::optional;

struct CpuCall : Call {
  Tensor initial;  // state
  std::vector<int64_t> bounds;
  Wkv6Shape shape;
  Wkv6Inputs inputs;

  template <typename... Arguments>
  explicit CpuCall(const Arguments&... arguments) : Call(arguments...) {
    initial = or_zeros(state);
    bounds = sequence_bounds(cu_seqlens, B, T);
    shape = {n_sequences, H, N, bounds.data(), element_of(r)};
    inputs = {r.const_data_ptr(), k.const_data_ptr(),        v.const_data_ptr(),
              w.const_data_ptr(), u.const_data_ptr<float>(), initial.const_data_ptr<float>()};
  }

  Tensor checkpoints(bool wanted) const {
    Tensor all = floats({wanted ? checkpoint_count(shape) : 0, H, N, N});
    // The places that no sequence fills are never read, but equal calls give equal outputs.
    for (int64_t i = 0; wanted && i < n_sequences; ++i) {
      int64_t n_spans = (bounds[i + 1] - bounds[i] + kCheckpointSpan - 1) / kCheckpointSpan;
      int64_t filled = checkpoint_index(shape, i, 0) + n_spans;
      all.slice(0, filled, checkpoint_index(shape, i + 1, 0)).zero_();
    }
    return all;
  }

  // A tensor of states, which the kernels always read.
  Tensor or_zeros(const optional<Tensor>& states) const {
    return states ? *states : floats(state_shape()).zero_();
  }

  template <typename Function>
  void for_heads(const Function& function) const {
    at::parallel_for(0, n_sequences * H, 1, function);
  }
};

std::tuple<Tensor, Tensor, Tensor> forward_cpu(const Tensor& r, const Tensor& k, const Tensor& v,
                                               const Tensor& w, const Tensor& u,
                                               const optional<Tensor>& state,
                                               const optional<Tensor>& cu_seqlens,
                                               bool for_backward) {
  CpuCall call(r, k, v, w, u, state, cu_seqlens);
  Tensor y = call.like_r(), new_state = call.floats(call.state_shape());
  Tensor checkpoints = call.checkpoints(for_backward);
  Wkv6Outputs out = {y.data_ptr(), new_state.data_ptr<float>(),
                     for_backward ? checkpoints.data_ptr<float>() : nullptr};
  call.for_heads([&](int64_t first, int64_t last) {
    cpu_kernels().wkv6_forward(call.shape, call.inputs, out, first, last);
  });
  return {y, new_state, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_cpu(
    const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
    const optional<Tensor>& state, const optional<Tensor>& cu_seqlens, const Tensor& checkpoints,
    const Tensor& grad_y, const optional<Tensor>& grad_state) {
  CpuCall call(r, k, v, w, u, state, cu_seqlens);
  Tensor dy = dense(grad_y), starts = dense(checkpoints);
  const optional<Tensor> given = dense(grad_state);
  call.check(dy, call.r.sizes(), call.r.scalar_type());
  if (given) call.check(*given, call.state_shape(), at::kFloat);
  const Tensor dstate = call.or_zeros(given);
  call.check(starts, {checkpoint_count(call.shape), call.H, call.N, call.N}, at::kFloat);
  Tensor dr = call.like_r(), dk = call.like_r(), dv = call.like_r(), dw = call.like_r();
  Tensor du = call.floats({call.n_sequences, call.H, call.N});
  Tensor dstate_in = call.floats(call.state_shape());
  Wkv6OutputGradients from = {dy.const_data_ptr(), dstate.const_data_ptr<float>()};
  Wkv6Gradients out = {dr.data_ptr(), dk.data_ptr(),        dv.data_ptr(),
                       dw.data_ptr(), du.data_ptr<float>(), dstate_in.data_ptr<float>()};
  call.for_heads([&](int64_t first, int64_t last) {
    cpu_kernels().wkv6_backward(call.shape, call.inputs, starts.const_data_ptr<float>(), from, out,
                                first, last);
  });
  return {dr, dk, dv, dw, du.sum(0), call.state ? dstate_in : call.state_gradient()};
}

}  // namespace
}  // namespace finchtune

TORCH_LIBRARY_IMPL(finchtune, CPU, library) {
  library.impl("wkv6_forward", &finchtune::forward_cpu);
  library.impl("wkv6_backward", &finchtune::backward_cpu);
}

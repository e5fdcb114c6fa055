// The torch operators finchtune::wkv6_forward and wkv6_backward on a CPU: memory and the
// calls into the kernels.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

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

  void forward(Tensor& y, Tensor& new_state, void* checkpoints) const {
    Wkv6Outputs out = {y.data_ptr(), new_state.data_ptr<float>(), static_cast<float*>(checkpoints)};
    for_heads([&](int64_t first, int64_t last) {
      cpu_kernels().wkv6_forward(shape, inputs, out, first, last);
    });
  }

  void backward(Gradients& all) const {
    const Tensor dstate = or_zeros(all.dstate);
    check(all.checkpoints, {checkpoint_count(shape), H, N, N}, at::kFloat);
    Tensor du = floats({n_sequences, H, N}), dstate_in = floats(state_shape());
    Wkv6OutputGradients from = {all.dy.const_data_ptr(), dstate.const_data_ptr<float>()};
    Wkv6Gradients out = {all.dr.data_ptr(), all.dk.data_ptr(),    all.dv.data_ptr(),
                         all.dw.data_ptr(), du.data_ptr<float>(), dstate_in.data_ptr<float>()};
    for_heads([&](int64_t first, int64_t last) {
      cpu_kernels().wkv6_backward(shape, inputs, all.checkpoints.const_data_ptr<float>(), from, out,
                                  first, last);
    });
    all.du = du.sum(0);
    all.dstate_in = state ? dstate_in : state_gradient();
  }
};

}  // namespace
}  // namespace finchtune

TORCH_LIBRARY_IMPL(finchtune, CPU, library) {
  library.impl("wkv6_forward", &finchtune::wkv6_forward<finchtune::CpuCall>);
  library.impl("wkv6_backward", &finchtune::wkv6_backward<finchtune::CpuCall>);
}

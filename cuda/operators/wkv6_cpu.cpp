// The torch operators finchtune::wkv6_forward and wkv6_backward on a CPU: memory and the
// calls into the kernels.

#include <torch/library.h>

#include "wkv6_call.h"
#include "wkv_cpu.h"

namespace finchtune {
namespace {

using at::Tensor;

struct Wkv6CpuCall : OnCpu<Wkv6Call> {
  using OnCpu::OnCpu;

  Wkv6Inputs inputs() const {
    return {
        row(0), row(1), row(2), row(3), u.const_data_ptr<float>(), initial.const_data_ptr<float>()};
  }

  void forward(Tensor& y, Tensor& new_state, void* checkpoints) const {
    WkvOutputs out = {y.data_ptr(), new_state.data_ptr<float>(), static_cast<float*>(checkpoints)};
    for_heads([&](int64_t first, int64_t last) {
      cpu_kernels().wkv6_forward(shape, inputs(), out, first, last);
    });
  }

  void backward(Wkv6CallGradients& all) const {
    const Tensor dstate = or_zeros(all.dstate);
    check(all.checkpoints, checkpoint_shape(), at::kFloat);
    Tensor du = floats({n_sequences, H, N}), dstate_in = floats(state_shape());
    WkvOutputGradients from = {all.dy.const_data_ptr(), dstate.const_data_ptr<float>()};
    Wkv6Gradients out = {all.row(0), all.row(1),           all.row(2),
                         all.row(3), du.data_ptr<float>(), dstate_in.data_ptr<float>()};
    for_heads([&](int64_t first, int64_t last) {
      cpu_kernels().wkv6_backward(shape, inputs(), all.checkpoints.const_data_ptr<float>(), from,
                                  out, first, last);
    });
    all.du = du.sum(0);
    all.dstate_in = state ? dstate_in : state_gradient();
  }
};

}  // namespace
}  // namespace finchtune

TORCH_LIBRARY_IMPL(finchtune, CPU, library) {
  library.impl("wkv6_forward", &finchtune::wkv6_forward<finchtune::Wkv6CpuCall>);
  library.impl("wkv6_backward", &finchtune::wkv6_backward<finchtune::Wkv6CpuCall>);
}

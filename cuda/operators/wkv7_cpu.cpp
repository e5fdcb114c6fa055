// The torch operators finchtune::wkv7_forward and wkv7_backward on a CPU: memory and the
// calls into the kernels.

#include <torch/library.h>

#include "wkv7_call.h"
#include "wkv_cpu.h"

namespace finchtune {
namespace {

using at::Tensor;

struct Wkv7CpuCall : OnCpu<Wkv7Call> {
  using OnCpu::OnCpu;

  Wkv7Inputs inputs() const {
    return {row(0), row(1), row(2), row(3), row(4), row(5), initial.const_data_ptr<float>()};
  }

  void forward(Tensor& y, Tensor& new_state, void* checkpoints) const {
    WkvOutputs out = {y.data_ptr(), new_state.data_ptr<float>(), static_cast<float*>(checkpoints)};
    for_heads([&](int64_t first, int64_t last) {
      cpu_kernels().wkv7_forward(shape, inputs(), out, first, last);
    });
  }

  void backward(WkvGradients& all) const {
    const Tensor dstate = or_zeros(all.dstate);
    check(all.checkpoints, checkpoint_shape(), at::kFloat);
    Tensor dstate_in = floats(state_shape());
    WkvOutputGradients from = {all.dy.const_data_ptr(), dstate.const_data_ptr<float>()};
    Wkv7Gradients out = {all.row(0),
                         all.row(1),
                         all.row(2),
                         all.row(3),
                         all.row(4),
                         all.row(5),
                         dstate_in.data_ptr<float>()};
    for_heads([&](int64_t first, int64_t last) {
      cpu_kernels().wkv7_backward(shape, inputs(), all.checkpoints.const_data_ptr<float>(), from,
                                  out, first, last);
    });
    all.dstate_in = state ? dstate_in : state_gradient();
  }
};

}  // namespace
}  // namespace finchtune

TORCH_LIBRARY_IMPL(finchtune, CPU, library) {
  library.impl("wkv7_forward", &finchtune::wkv7_forward<finchtune::Wkv7CpuCall>);
  library.impl("wkv7_backward", &finchtune::wkv7_backward<finchtune::Wkv7CpuCall>);
}

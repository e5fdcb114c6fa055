// The torch operators finchtune::wkv7_forward and wkv7_backward on a GPU: memory and the
// calls into the kernels.

#include "../gpu/wkv7.h"

#include <torch/library.h>

#include "wkv7_call.h"
#include "wkv_gpu.h"

namespace finchtune {
namespace {

using at::Tensor;

struct Wkv7CudaCall : OnGpu<Wkv7Call> {
  using OnGpu::OnGpu;

  std::vector<const void*> inputs() const {
    std::vector<const void*> pointers;
    for (const Tensor& x : rows) pointers.push_back(x.const_data_ptr());
    return pointers;
  }

  Tensor checkpoints(bool wanted) const {
    return floats({wanted ? wkv7_checkpoint_count(&problem) : 0, H, N, N});
  }

  void forward(Tensor& y, Tensor& new_state, void* checkpoints) const {
    succeed(::wkv7_forward(&problem, inputs().data(), data_or_null<float>(state), y.data_ptr(),
                           new_state.data_ptr<float>(), static_cast<float*>(checkpoints), stream));
  }

  void backward(WkvGradients& all) const {
    check(all.checkpoints, {wkv7_checkpoint_count(&problem), H, N, N}, at::kFloat);
    all.dstate_in = state_gradient();
    std::vector<void*> gradients;
    for (const Tensor& x : all.rows) gradients.push_back(x.data_ptr());
    Tensor memory = scratch(wkv7_backward_scratch_bytes(&problem));
    succeed(::wkv7_backward(
        &problem, inputs().data(), all.dy.const_data_ptr(), data_or_null<float>(all.dstate),
        all.checkpoints.const_data_ptr<float>(), gradients.data(),
        state ? all.dstate_in.data_ptr<float>() : nullptr, memory.data_ptr(), stream));
  }
};

}  // namespace
}  // namespace finchtune

TORCH_LIBRARY_IMPL(finchtune, CUDA, library) {
  library.impl("wkv7_forward", &finchtune::wkv7_forward<finchtune::Wkv7CudaCall>);
  library.impl("wkv7_backward", &finchtune::wkv7_backward<finchtune::Wkv7CudaCall>);
}

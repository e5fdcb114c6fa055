// The torch operators finchtune::wkv6_forward and wkv6_backward on a GPU: memory and the
// calls into the kernels.

#include <torch/library.h>

#include "wkv6_call.h"
#include "wkv_gpu.h"

namespace finchtune {
namespace {

using at::Tensor;

struct Wkv6CudaCall : OnGpu<Wkv6Call> {
  using OnGpu::OnGpu;

  Tensor checkpoints(bool wanted) const {
    const int64_t count = wkv6_checkpoint_count(&problem);
    const bool wide = wkv6_checkpoint_bytes(&problem) == count * H * N * N * sizeof(float);
    return at::empty({wanted ? count : 0, H, N, N},
                     r().options().dtype(wide ? at::kFloat : at::kBFloat16));
  }

  void forward(Tensor& y, Tensor& new_state, void* checkpoints) const {
    Tensor memory = scratch(wkv6_forward_scratch_bytes(&problem));
    succeed(::wkv6_forward(&problem, row(0), row(1), row(2), row(3), u.const_data_ptr<float>(),
                           data_or_null<float>(state), y.data_ptr(), new_state.data_ptr<float>(),
                           checkpoints, memory.data_ptr(), stream));
  }

  void backward(Wkv6CallGradients& all) const {
    TORCH_CHECK(all.checkpoints.nbytes() == wkv6_checkpoint_bytes(&problem),
                "wkv6: these checkpoints are of another forward: ", all.checkpoints.sizes());
    all.du = floats({H, N});
    all.dstate_in = state_gradient();
    Tensor memory = scratch(wkv6_backward_scratch_bytes(&problem));
    succeed(::wkv6_backward(
        &problem, row(0), row(1), row(2), row(3), u.const_data_ptr<float>(),
        all.dy.const_data_ptr(), data_or_null<float>(all.dstate), all.checkpoints.const_data_ptr(),
        all.row(0), all.row(1), all.row(2), all.row(3), all.du.data_ptr<float>(),
        state ? all.dstate_in.data_ptr<float>() : nullptr, memory.data_ptr(), stream));
  }
};

}  // namespace
}  // namespace finchtune

TORCH_LIBRARY_IMPL(finchtune, CUDA, library) {
  library.impl("wkv6_forward", &finchtune::wkv6_forward<finchtune::Wkv6CudaCall>);
  library.impl("wkv6_backward", &finchtune::wkv6_backward<finchtune::Wkv6CudaCall>);
}

// The torch operators finchtune::wkv6_forward and wkv6_backward on a GPU: memory and the
// calls into the kernels.

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "../gpu/wkv6.h"
#include "wkv6_call.h"

namespace finchtune {
namespace {

using at::Tensor;
using std::optional;

struct Wkv6CudaCall : Wkv6Call {
  c10::cuda::CUDAGuard guard;  // kernels and scratch memory go to r's device,
  void* stream;                // and onto the stream that torch uses there
  Wkv6Problem problem;

  template <typename... Arguments>
  explicit Wkv6CudaCall(const Arguments&... arguments)
      : Wkv6Call(arguments...),
        guard(r().device()),
        stream(c10::cuda::getCurrentCUDAStream().stream()) {
    problem = {B,
               T,
               H,
               N,
               dtype(),
               n_sequences,
               cu_seqlens ? cu_seqlens->const_data_ptr<int32_t>() : nullptr};
  }

  int32_t dtype() const {
    switch (r().scalar_type()) {
      case at::kFloat:
        return WKV6_FP32;
      case at::kBFloat16:
        return WKV6_BF16;
      case at::kHalf:
        return WKV6_FP16;
      default:
        TORCH_CHECK(false, "wkv6: the GPU kernels do not take ", r().scalar_type());
    }
  }

  Tensor checkpoints(bool wanted) const {
    const int64_t count = wkv6_checkpoint_count(&problem);
    const bool wide = wkv6_checkpoint_bytes(&problem) == count * H * N * N * sizeof(float);
    return at::empty({wanted ? count : 0, H, N, N},
                     r().options().dtype(wide ? at::kFloat : at::kBFloat16));
  }

  Tensor scratch(size_t bytes) const {
    return at::empty({static_cast<int64_t>(bytes)}, r().options().dtype(at::kByte));
  }

  static void succeed(int error) {
    TORCH_CHECK(error == 0, "wkv6: the GPU kernel failed: ", wkv6_error_string(error));
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

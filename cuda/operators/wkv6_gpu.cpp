// The torch operators finchtune::wkv6_forward and wkv6_backward on a GPU: every check, all memory,
// and the calls into the kernels.

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../gpu/wkv6.h"
#include "wkv6_call.h"

namespace finchtune {
namespace {

using at::Tensor;
using std::optional;

struct CudaCall : Call {
  c10::cuda::CUDAGuard guard;  // kernels and scratch memory go to r's device,
  void* stream;                // and onto the stream that torch uses there
  Wkv6Problem problem;

  template <typename... Arguments>
  explicit CudaCall(const Arguments&... arguments)
      : Call(arguments...), guard(r.device()), stream(c10::cuda::getCurrentCUDAStream().stream()) {
    problem = {B,
               T,
               H,
               N,
               dtype(),
               n_sequences,
               cu_seqlens ? cu_seqlens->const_data_ptr<int32_t>() : nullptr};
  }

  int32_t dtype() const {
    switch (r.scalar_type()) {
      case at::kFloat:
        return WKV6_FP32;
      case at::kBFloat16:
        return WKV6_BF16;
      case at::kHalf:
        return WKV6_FP16;
      default:
        TORCH_CHECK(false, "wkv6: the GPU kernels do not take ", r.scalar_type());
    }
  }

  Tensor checkpoints(bool wanted) const {
    const int64_t count = wkv6_checkpoint_count(&problem);
    const bool wide = wkv6_checkpoint_bytes(&problem) == count * H * N * N * sizeof(float);
    return at::empty({wanted ? count : 0, H, N, N},
                     r.options().dtype(wide ? at::kFloat : at::kBFloat16));
  }

  Tensor scratch(size_t bytes) const {
    return at::empty({static_cast<int64_t>(bytes)}, r.options().dtype(at::kByte));
  }

  static void succeed(int error) {
    TORCH_CHECK(error == 0, "wkv6: the GPU kernel failed: ", wkv6_error_string(error));
  }
};

std::tuple<Tensor, Tensor, Tensor> forward_cuda(const Tensor& r, const Tensor& k, const Tensor& v,
                                                const Tensor& w, const Tensor& u,
                                                const optional<Tensor>& state,
                                                const optional<Tensor>& cu_seqlens,
                                                bool for_backward) {
  CudaCall call(r, k, v, w, u, state, cu_seqlens);
  Tensor y = call.like_r(), new_state = call.floats(call.state_shape());
  Tensor checkpoints = call.checkpoints(for_backward);
  Tensor scratch = call.scratch(wkv6_forward_scratch_bytes(&call.problem));
  CudaCall::succeed(wkv6_forward(
      &call.problem, call.r.const_data_ptr(), call.k.const_data_ptr(), call.v.const_data_ptr(),
      call.w.const_data_ptr(), call.u.const_data_ptr<float>(), data_or_null<float>(call.state),
      y.data_ptr(), new_state.data_ptr<float>(), for_backward ? checkpoints.data_ptr() : nullptr,
      scratch.data_ptr(), call.stream));
  return {y, new_state, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_cuda(
    const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
    const optional<Tensor>& state, const optional<Tensor>& cu_seqlens, const Tensor& checkpoints,
    const Tensor& grad_y, const optional<Tensor>& grad_state) {
  CudaCall call(r, k, v, w, u, state, cu_seqlens);
  Tensor dy = dense(grad_y), starts = dense(checkpoints);
  const optional<Tensor> dstate = dense(grad_state);
  call.check(dy, call.r.sizes(), call.r.scalar_type());
  if (dstate) call.check(*dstate, call.state_shape(), at::kFloat);
  TORCH_CHECK(starts.nbytes() == wkv6_checkpoint_bytes(&call.problem),
              "wkv6: these checkpoints are of another forward: ", starts.sizes());
  Tensor dr = call.like_r(), dk = call.like_r(), dv = call.like_r(), dw = call.like_r();
  Tensor du = call.floats({call.H, call.N}), dstate_in = call.state_gradient();
  Tensor scratch = call.scratch(wkv6_backward_scratch_bytes(&call.problem));
  CudaCall::succeed(wkv6_backward(
      &call.problem, call.r.const_data_ptr(), call.k.const_data_ptr(), call.v.const_data_ptr(),
      call.w.const_data_ptr(), call.u.const_data_ptr<float>(), dy.const_data_ptr(),
      data_or_null<float>(dstate), starts.const_data_ptr(), dr.data_ptr(), dk.data_ptr(),
      dv.data_ptr(), dw.data_ptr(), du.data_ptr<float>(),
      call.state ? dstate_in.data_ptr<float>() : nullptr, scratch.data_ptr(), call.stream));
  return {dr, dk, dv, dw, du, dstate_in};
}

}  // namespace
}  // namespace finchtune

TORCH_LIBRARY_IMPL(finchtune, CUDA, library) {
  library.impl("wkv6_forward", &finchtune::forward_cuda);
  library.impl("wkv6_backward", &finchtune::backward_cuda);
}

// The torch operators finchtune::wkv6_forward and wkv6_backward: every check, all memory, and the
// calls into the kernels for the CPU and, in a CUDA build, for the GPU.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "operators.h"

#ifdef FINCHTUNE_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../gpu/wkv6.h"
#endif

namespace finchtune {
namespace {

using at::Tensor;
using std::optional;

// What a call works on: the inputs made dense and checked against each other.
struct Call {
  Tensor r, k, v, w, u, state;
  optional<Tensor> cu_seqlens;
  int64_t B, T, H, N, n_sequences;

  Call(const Tensor& r_, const Tensor& k_, const Tensor& v_, const Tensor& w_, const Tensor& u_,
       const Tensor& state_, const optional<Tensor>& cu_seqlens_)
      : r(dense(r_)), k(dense(k_)), v(dense(v_)), w(dense(w_)), u(dense(u_)),
        state(dense(state_)) {
    TORCH_CHECK(r.dim() == 4 && r.numel() > 0, "wkv6: r must be (B, T, H, N), not ", r.sizes());
    B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3);
    TORCH_CHECK(N % 8 == 0 && N <= 128, "wkv6: N must be a multiple of 8 up to 128, not ", N);
    n_sequences = B;
    if (cu_seqlens_) {
      cu_seqlens = cu_seqlens_->contiguous();
      TORCH_CHECK(B == 1 && cu_seqlens->dim() == 1 && cu_seqlens->numel() > 1 &&
                      cu_seqlens->scalar_type() == at::kInt && cu_seqlens->device() == r.device(),
                  "wkv6: cu_seqlens must be n+1 int32 boundaries beside r, with B = 1");
      n_sequences = cu_seqlens->numel() - 1;
    }
    for (const Tensor* x : {&k, &v, &w}) check(*x, r.sizes(), r.scalar_type());
    check(u, {H, N}, at::kFloat);
    check(state, {n_sequences, H, N, N}, at::kFloat);
  }

  void check(const Tensor& x, at::IntArrayRef shape, at::ScalarType dtype) const {
    TORCH_CHECK(x.sizes() == shape && x.scalar_type() == dtype && x.device() == r.device(),
                "wkv6: expected ", shape, " ", dtype, " on ", r.device(), ", got ", x.sizes(), " ",
                x.scalar_type(), " on ", x.device());
  }

  Tensor like_r() const { return at::empty(r.sizes(), r.options()); }
  Tensor floats(at::IntArrayRef shape) const {
    return at::empty(shape, r.options().dtype(at::kFloat));
  }
};

struct CpuCall : Call {
  std::vector<int64_t> bounds;
  Wkv6Shape shape;
  Wkv6Inputs inputs;

  template <typename... Arguments>
  explicit CpuCall(const Arguments&... arguments) : Call(arguments...) {
    bounds = sequence_bounds(cu_seqlens, B, T);
    shape = {n_sequences, H, N, bounds.data(), element_of(r)};
    inputs = {r.const_data_ptr(),         k.const_data_ptr(),        v.const_data_ptr(),
              w.const_data_ptr(),         u.const_data_ptr<float>(), state.const_data_ptr<float>()};
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

  template <typename Function>
  void for_heads(const Function& function) const {
    at::parallel_for(0, n_sequences * H, 1, function);
  }
};

std::tuple<Tensor, Tensor, Tensor> forward_cpu(const Tensor& r, const Tensor& k, const Tensor& v,
                                               const Tensor& w, const Tensor& u,
                                               const Tensor& state,
                                               const optional<Tensor>& cu_seqlens,
                                               bool for_backward) {
  CpuCall call(r, k, v, w, u, state, cu_seqlens);
  Tensor y = call.like_r(), new_state = call.floats(call.state.sizes());
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
    const Tensor& state, const optional<Tensor>& cu_seqlens, const Tensor& checkpoints,
    const Tensor& grad_y, const Tensor& grad_state) {
  CpuCall call(r, k, v, w, u, state, cu_seqlens);
  Tensor dy = dense(grad_y), dstate = dense(grad_state), starts = dense(checkpoints);
  call.check(dy, call.r.sizes(), call.r.scalar_type());
  call.check(dstate, call.state.sizes(), at::kFloat);
  call.check(starts, {checkpoint_count(call.shape), call.H, call.N, call.N}, at::kFloat);
  Tensor dr = call.like_r(), dk = call.like_r(), dv = call.like_r(), dw = call.like_r();
  Tensor du = call.floats({call.n_sequences, call.H, call.N});
  Tensor dstate_in = call.floats(call.state.sizes());
  Wkv6OutputGradients from = {dy.const_data_ptr(), dstate.const_data_ptr<float>()};
  Wkv6Gradients out = {dr.data_ptr(),         dk.data_ptr(),        dv.data_ptr(),
                       dw.data_ptr(),         du.data_ptr<float>(), dstate_in.data_ptr<float>()};
  call.for_heads([&](int64_t first, int64_t last) {
    cpu_kernels().wkv6_backward(call.shape, call.inputs, starts.const_data_ptr<float>(), from, out,
                                first, last);
  });
  return {dr, dk, dv, dw, du.sum(0), dstate_in};
}

#ifdef FINCHTUNE_CUDA

struct CudaCall : Call {
  c10::cuda::CUDAGuard guard;  // kernels and scratch memory go to r's device,
  void* stream;                // and onto the stream that torch uses there
  Wkv6Problem problem;

  template <typename... Arguments>
  explicit CudaCall(const Arguments&... arguments)
      : Call(arguments...), guard(r.device()),
        stream(c10::cuda::getCurrentCUDAStream().stream()) {
    problem = {B, T, H, N, dtype(), n_sequences,
               cu_seqlens ? cu_seqlens->const_data_ptr<int32_t>() : nullptr};
  }

  int32_t dtype() const {
    switch (r.scalar_type()) {
      case at::kFloat: return WKV6_FP32;
      case at::kBFloat16: return WKV6_BF16;
      case at::kHalf: return WKV6_FP16;
      default: TORCH_CHECK(false, "wkv6: the GPU kernels do not take ", r.scalar_type());
    }
  }

  Tensor checkpoints(bool wanted) const {
    const int64_t count = B * T / kCheckpointSpan + n_sequences, matrices = count * H * N * N;
    const bool wide = wkv6_checkpoint_bytes(&problem) == matrices * sizeof(float);
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
                                                const Tensor& state,
                                                const optional<Tensor>& cu_seqlens,
                                                bool for_backward) {
  CudaCall call(r, k, v, w, u, state, cu_seqlens);
  Tensor y = call.like_r(), new_state = call.floats(call.state.sizes());
  Tensor checkpoints = call.checkpoints(for_backward);
  Tensor scratch = call.scratch(wkv6_forward_scratch_bytes(&call.problem));
  CudaCall::succeed(wkv6_forward(
      &call.problem, call.r.const_data_ptr(), call.k.const_data_ptr(), call.v.const_data_ptr(),
      call.w.const_data_ptr(), call.u.const_data_ptr<float>(), call.state.const_data_ptr<float>(),
      y.data_ptr(), new_state.data_ptr<float>(), for_backward ? checkpoints.data_ptr() : nullptr,
      scratch.data_ptr(), call.stream));
  return {y, new_state, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_cuda(
    const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
    const Tensor& state, const optional<Tensor>& cu_seqlens, const Tensor& checkpoints,
    const Tensor& grad_y, const Tensor& grad_state) {
  CudaCall call(r, k, v, w, u, state, cu_seqlens);
  Tensor dy = dense(grad_y), dstate = dense(grad_state), starts = dense(checkpoints);
  call.check(dy, call.r.sizes(), call.r.scalar_type());
  call.check(dstate, call.state.sizes(), at::kFloat);
  TORCH_CHECK(starts.nbytes() == wkv6_checkpoint_bytes(&call.problem),
              "wkv6: these checkpoints are of another forward: ", starts.sizes());
  Tensor dr = call.like_r(), dk = call.like_r(), dv = call.like_r(), dw = call.like_r();
  Tensor du = call.floats({call.H, call.N}), dstate_in = call.floats(call.state.sizes());
  Tensor scratch = call.scratch(wkv6_backward_scratch_bytes(&call.problem));
  CudaCall::succeed(wkv6_backward(
      &call.problem, call.r.const_data_ptr(), call.k.const_data_ptr(), call.v.const_data_ptr(),
      call.w.const_data_ptr(), call.u.const_data_ptr<float>(), dy.const_data_ptr(),
      dstate.const_data_ptr<float>(), starts.const_data_ptr(), dr.data_ptr(), dk.data_ptr(),
      dv.data_ptr(), dw.data_ptr(), du.data_ptr<float>(), dstate_in.data_ptr<float>(),
      scratch.data_ptr(), call.stream));
  return {dr, dk, dv, dw, du, dstate_in};
}

#endif

}  // namespace
}  // namespace finchtune

TORCH_LIBRARY_FRAGMENT(finchtune, library) {
  library.def(
      "wkv6_forward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state, "
      "Tensor? cu_seqlens, bool for_backward) -> (Tensor y, Tensor state, Tensor checkpoints)");
  library.def(
      "wkv6_backward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state, "
      "Tensor? cu_seqlens, Tensor checkpoints, Tensor grad_y, Tensor grad_state) "
      "-> (Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state)");
}

TORCH_LIBRARY_IMPL(finchtune, CPU, library) {
  library.impl("wkv6_forward", &finchtune::forward_cpu);
  library.impl("wkv6_backward", &finchtune::backward_cpu);
}

#ifdef FINCHTUNE_CUDA
TORCH_LIBRARY_IMPL(finchtune, CUDA, library) {
  library.impl("wkv6_forward", &finchtune::forward_cuda);
  library.impl("wkv6_backward", &finchtune::backward_cuda);
}
#endif

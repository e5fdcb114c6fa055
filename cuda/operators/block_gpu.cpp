// The torch operators of a block's element-wise parts and of the loss, on a GPU: every check, all
// memory, and the calls into the kernels.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "composite.h"
#include "gpu_call.h"

namespace finchtune {
namespace {

using at::Tensor;
using std::optional;

// x (B, T, C) and what precedes its sequences: the rows of `before` (S, C), or zeros.
struct Mix : GpuCall {
  Tensor x, maa;
  optional<Tensor> before, cu_seqlens;
  Shift shift;

  Mix(const Tensor& x_, const optional<Tensor>& before_, const optional<Tensor>& cu_seqlens_,
      const Tensor& maa_)
      : GpuCall(x_), x(dense(x_)), maa(dense(maa_)), before(dense(before_)) {
    TORCH_CHECK(x.dim() == 3 && x.numel() > 0 && maa.dim() == 2, "x must be (B, T, C), maa (n, C)");
    TORCH_CHECK(!cu_seqlens_ || x.size(0) == 1, "sequences are packed into a batch of 1");
    TORCH_CHECK(maa.size(0) <= MOST_MIXTURES, "at most ", +MOST_MIXTURES, " mixtures");
    if (cu_seqlens_) cu_seqlens = cu_seqlens_->to(x.device(), at::kInt).contiguous();
    const int64_t n_seq = cu_seqlens ? cu_seqlens->numel() - 1 : x.size(0);
    shift = {rows(),
             x.size(2),
             n_seq,
             x.size(1),
             cu_seqlens ? cu_seqlens->const_data_ptr<int32_t>() : nullptr,
             elementwise_dtype(x)};
    check_like(maa, {maa.size(0), x.size(2)}, x);
    if (before) check_like(*before, {n_seq, x.size(2)}, x);
  }

  int n() const { return static_cast<int>(maa.size(0)); }
  int64_t rows() const { return x.size(0) * x.size(1); }
  Tensor like_rows() const { return at::empty({rows(), x.size(2)}, x.options()); }

  // Of n tensors (B T, C), or of none.
  std::vector<void*> pointers(at::TensorList tensors) const {
    std::vector<void*> found;
    for (const Tensor& tensor : tensors) {
      check_like(tensor, {rows(), x.size(2)}, x);
      TORCH_CHECK(tensor.is_contiguous(), "mixtures must be dense");
      found.push_back(tensor.data_ptr());
    }
    TORCH_CHECK(tensors.empty() || tensors.size() == static_cast<size_t>(n()),
                "a tensor for each mixture");
    return found;
  }

  void forward(const std::vector<void*>& blends, const std::vector<void*>& out) const {
    succeed(finchtune_token_mix(&shift, n(), x.const_data_ptr(), pointer_or_null(before),
                                maa.const_data_ptr(), blends.empty() ? nullptr : blends.data(),
                                out.data(), stream));
  }
};

std::vector<Tensor> token_mix(const Tensor& x, const optional<Tensor>& before,
                              const optional<Tensor>& cu_seqlens, const Tensor& maa) {
  const Mix call(x, before, cu_seqlens, maa);
  std::vector<Tensor> out;
  for (int j = 0; j < call.n(); ++j) out.push_back(call.like_rows());
  call.forward({}, call.pointers(out));
  return out;
}

void token_mix_(at::TensorList blends, const Tensor& x, const optional<Tensor>& before,
                const optional<Tensor>& cu_seqlens, const Tensor& maa) {
  const Mix call(x, before, cu_seqlens, maa);
  const std::vector<void*> pointers = call.pointers(blends);
  TORCH_CHECK(!pointers.empty(), "token_mix_ needs blends");
  call.forward(pointers, pointers);
}

std::tuple<Tensor, Tensor, Tensor> token_mix_backward(at::TensorList douts, const Tensor& x,
                                                      const optional<Tensor>& before,
                                                      const optional<Tensor>& cu_seqlens,
                                                      const Tensor& maa, at::TensorList blends,
                                                      bool of_maa) {
  const Mix call(x, before, cu_seqlens, maa);
  TORCH_CHECK(!douts.empty(), "one gradient for each mixture");
  std::vector<Tensor> dense_douts;
  for (const Tensor& dout : douts) dense_douts.push_back(dense(dout));
  const std::vector<void*> from = call.pointers(dense_douts), own = call.pointers(blends);
  Tensor sum = call.like_rows(), blended = call.like_rows();
  Tensor dmaa = floats({of_maa ? call.n() : 0, x.size(2)}, x);
  const size_t needed = of_maa ? finchtune_token_mix_scratch_bytes(&call.shift, call.n()) : 0;
  Tensor scratch = bytes(needed, x);
  GpuCall::succeed(finchtune_token_mix_backward(
      &call.shift, call.n(), call.x.const_data_ptr(), pointer_or_null(call.before),
      call.maa.const_data_ptr(), from.data(), own.empty() ? nullptr : own.data(), sum.data_ptr(),
      blended.data_ptr(), of_maa ? dmaa.data_ptr<float>() : nullptr,
      of_maa ? scratch.data_ptr() : nullptr, call.stream));
  return {sum, blended, dmaa};
}

std::tuple<Tensor, Tensor> shift_backward(const Tensor& sum, const Tensor& blended,
                                          const optional<Tensor>& more, const Tensor& x,
                                          const optional<Tensor>& cu_seqlens, const Tensor& maa,
                                          bool of_before) {
  const Mix call(x, std::nullopt, cu_seqlens, maa);
  const optional<Tensor> dense_more = dense(more);
  for (const Tensor* part : {&sum, &blended}) {
    check_like(*part, {call.rows(), x.size(2)}, x);
    TORCH_CHECK(part->is_contiguous(), "the sums must be dense");
  }
  if (dense_more) check_like(*dense_more, sum.sizes(), x);
  Tensor dx = at::empty(x.sizes(), x.options());
  const std::vector<int64_t> shape = {of_before ? call.shift.n_seq : 0, x.size(2)};
  // Sequences without tokens pass nothing back.
  Tensor dbefore = cu_seqlens ? at::zeros(shape, x.options()) : at::empty(shape, x.options());
  GpuCall::succeed(finchtune_shift_backward(&call.shift, sum.const_data_ptr(),
                                            blended.const_data_ptr(), pointer_or_null(dense_more),
                                            call.maa.const_data_ptr(), dx.data_ptr(),
                                            of_before ? dbefore.data_ptr() : nullptr, call.stream));
  return {dx, dbefore};
}

struct Norm : GpuCall {
  Tensor y, gate, weight, bias;
  GatedNorm norm;

  // y, gate (tokens, C), weight, bias (C)
  Norm(const Tensor& y_, const Tensor& gate_, const Tensor& weight_, const Tensor& bias_,
       int64_t groups, double eps)
      : GpuCall(y_), y(dense(y_)), gate(dense(gate_)), weight(dense(weight_)), bias(dense(bias_)) {
    TORCH_CHECK(y.dim() == 2 && y.numel() > 0 && groups > 0 && y.size(1) % groups == 0,
                "y must be (tokens, groups * size)");
    check_like(gate, y.sizes(), y);
    for (const Tensor* x : {&weight, &bias}) check_like(*x, {y.size(1)}, y);
    norm = {y.size(0),
            groups,
            y.size(1) / groups,
            static_cast<float>(eps),
            elementwise_dtype(y),
            y.const_data_ptr(),
            gate.const_data_ptr(),
            weight.const_data_ptr(),
            bias.const_data_ptr()};
  }
};

Tensor gated_norm(const Tensor& y, const Tensor& gate, const Tensor& weight, const Tensor& bias,
                  int64_t groups, double eps) {
  const Norm call(y, gate, weight, bias, groups, eps);
  Tensor out = at::empty(y.sizes(), y.options());
  GpuCall::succeed(finchtune_gated_norm(&call.norm, out.data_ptr(), call.stream));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_norm_backward(const Tensor& dout, const Tensor& y,
                                                               const Tensor& gate,
                                                               const Tensor& weight,
                                                               const Tensor& bias, int64_t groups,
                                                               double eps, bool of_weight) {
  const Norm call(y, gate, weight, bias, groups, eps);
  const Tensor from = dense(dout);
  check_like(from, y.sizes(), y);
  Tensor dy = at::empty(y.sizes(), y.options()), dgate = at::empty_like(dy);
  Tensor parameters = floats({2, of_weight ? y.size(1) : 0}, y);
  Tensor scratch = bytes(of_weight ? finchtune_gated_norm_scratch_bytes(&call.norm) : 0, y);
  GpuCall::succeed(finchtune_gated_norm_backward(
      &call.norm, from.const_data_ptr(), dy.data_ptr(), dgate.data_ptr(),
      of_weight ? parameters.data_ptr<float>() : nullptr, of_weight ? scratch.data_ptr() : nullptr,
      call.stream));
  return {dy, dgate, parameters[0], parameters[1]};
}

Tensor squared_relu(const Tensor& x) {
  const GpuCall call(x);
  const Tensor from = dense(x);
  Tensor y = at::empty(x.sizes(), x.options());
  GpuCall::succeed(finchtune_squared_relu(elementwise_dtype(x), x.numel(), from.const_data_ptr(),
                                          y.data_ptr(), call.stream));
  return y;
}

Tensor squared_relu_backward(const Tensor& dy, const Tensor& y) {
  const GpuCall call(y);
  check_like(dy, y.sizes(), y);
  const Tensor from = dense(dy), result = dense(y);
  Tensor dx = at::empty(y.sizes(), y.options());
  GpuCall::succeed(finchtune_squared_relu_backward(elementwise_dtype(y), y.numel(),
                                                   from.const_data_ptr(), result.const_data_ptr(),
                                                   dx.data_ptr(), call.stream));
  return dx;
}

Tensor sigmoid_gate(const Tensor& gate, const Tensor& y) {
  const GpuCall call(y);
  check_like(gate, y.sizes(), y);
  const Tensor gates = dense(gate), values = dense(y);
  Tensor out = at::empty(y.sizes(), y.options());
  GpuCall::succeed(finchtune_sigmoid_gate(elementwise_dtype(y), y.numel(), gates.const_data_ptr(),
                                          values.const_data_ptr(), out.data_ptr(), call.stream));
  return out;
}

std::tuple<Tensor, Tensor> sigmoid_gate_backward(const Tensor& dout, const Tensor& gate,
                                                 const Tensor& y) {
  const GpuCall call(y);
  check_like(gate, y.sizes(), y);
  check_like(dout, y.sizes(), y);
  const Tensor gates = dense(gate), values = dense(y), from = dense(dout);
  Tensor dgate = at::empty(y.sizes(), y.options()), dy = at::empty_like(dgate);
  GpuCall::succeed(finchtune_sigmoid_gate_backward(
      elementwise_dtype(y), y.numel(), from.const_data_ptr(), gates.const_data_ptr(),
      values.const_data_ptr(), dgate.data_ptr(), dy.data_ptr(), call.stream));
  return {dgate, dy};
}

Tensor cross_entropy_(const Tensor& logits, const Tensor& labels, double l2wrap) {
  TORCH_CHECK(logits.dim() == 2 && logits.numel() > 0 && logits.is_contiguous() &&
                  labels.is_contiguous() && labels.device() == logits.device() &&
                  labels.sizes() == logits.sizes().slice(0, 1) && labels.scalar_type() == at::kLong,
              "cross_entropy_: logits must be dense (rows, V), labels (rows) int64");
  const GpuCall call(logits);
  Tensor losses = floats(labels.sizes(), logits);
  GpuCall::succeed(
      finchtune_cross_entropy(elementwise_dtype(logits), logits.size(0), logits.size(1),
                              logits.data_ptr(), labels.const_data_ptr<int64_t>(),
                              static_cast<float>(l2wrap), losses.data_ptr<float>(), call.stream));
  return losses;
}

}  // namespace
}  // namespace finchtune

TORCH_LIBRARY_IMPL(finchtune, CUDA, library) {
  library.impl("token_mix", &finchtune::token_mix);
  library.impl("token_mix_", &finchtune::token_mix_);
  library.impl("token_mix_backward", &finchtune::token_mix_backward);
  library.impl("shift_backward", &finchtune::shift_backward);
  library.impl("gated_norm", &finchtune::gated_norm);
  library.impl("gated_norm_backward", &finchtune::gated_norm_backward);
  library.impl("squared_relu", &finchtune::squared_relu);
  library.impl("squared_relu_backward", &finchtune::squared_relu_backward);
  library.impl("sigmoid_gate", &finchtune::sigmoid_gate);
  library.impl("sigmoid_gate_backward", &finchtune::sigmoid_gate_backward);
  library.impl("cross_entropy_", &finchtune::cross_entropy_);
  finchtune::add_composites(library);
}

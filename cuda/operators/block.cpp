// The torch operators of a block's element-wise parts, on a CPU: every check, all memory, and the
// calls into the kernels.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "composite.h"
#include "operators.h"

namespace finchtune {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

// The items of a call that does `elements` of work, shared out among the threads.
template <typename F>
void in_parallel(int64_t items, int64_t elements, const F& function) {
  const int64_t grain = std::max<int64_t>(1, kGrain * items / std::max<int64_t>(1, elements));
  at::parallel_for(0, items, grain, function);
}

void check(const Tensor& x, at::IntArrayRef shape, const Tensor& like) {
  TORCH_CHECK(x.sizes() == shape && x.scalar_type() == like.scalar_type(), "expected ", shape, " ",
              like.scalar_type(), ", got ", x.sizes(), " ", x.scalar_type());
}

void* data_or_null(const optional<Tensor>& x) { return x ? x->data_ptr() : nullptr; }

// A TokenMix and the memory it points to.
struct Mix {
  Tensor x, before, maa;
  std::vector<int64_t> bounds;
  std::vector<void*> pointers;  // to blends
  TokenMix mix;

  // x (B, T, C), before (S, C), a row before each sequence, or none for zeros, maa (n, C), blends n
  // or none of (B T, C). The sequences are the B rows of x or, with cu_seqlens, packed into B = 1.
  Mix(const Tensor& x_, const optional<Tensor>& before_, const optional<Tensor>& cu_seqlens,
      const Tensor& maa_, at::TensorList blends = {})
      : x(x_.contiguous()), maa(maa_.contiguous()) {
    TORCH_CHECK(x.dim() == 3 && maa.dim() == 2, "x must be (B, T, C), maa (n, C)");
    TORCH_CHECK(!cu_seqlens || x.size(0) == 1, "sequences are packed into a batch of 1");
    const int64_t B = x.size(0), T = x.size(1), C = x.size(2), n = maa.size(0);
    bounds = sequence_bounds(cu_seqlens, B, T);
    before = before_ ? before_->contiguous() : at::zeros({1, C}, x.options());
    if (before_) check(before, {n_sequences(), C}, x);
    check(maa, {n, C}, x);
    TORCH_CHECK(blends.empty() || static_cast<int64_t>(blends.size()) == n, "a blend for each maa");
    for (const Tensor& blend : blends) {
      check(blend, {B * T, C}, x);
      TORCH_CHECK(blend.is_contiguous(), "blends are written to and must be dense");
      pointers.push_back(blend.data_ptr());
    }
    mix = {n_sequences(),
           bounds.data(),
           C,
           n,
           element_of(x),
           x.const_data_ptr(),
           before.const_data_ptr(),
           before_ ? C : 0,
           maa.const_data_ptr(),
           blends.empty() ? nullptr : pointers.data()};
  }

  int64_t rows() const { return x.size(0) * x.size(1); }
  int64_t n_sequences() const { return static_cast<int64_t>(bounds.size()) - 1; }

  // function(first channel, last channel), ranges of whole cache lines
  template <typename F>
  void for_bands(const F& function) const {
    constexpr int64_t kBand = 32;
    const int64_t C = mix.n_channels;
    in_parallel((C + kBand - 1) / kBand, rows() * C * mix.n_mixtures,
                [&](int64_t i, int64_t j) { function(i * kBand, std::min(j * kBand, C)); });
  }
};

void token_mix_into(const Mix& call, void* const* out) {
  call.for_bands([&](int64_t i, int64_t j) { cpu_kernels().token_mix(call.mix, out, i, j); });
}

std::vector<Tensor> token_mix(const Tensor& x, const optional<Tensor>& before,
                              const optional<Tensor>& cu_seqlens, const Tensor& maa) {
  Mix call(x, before, cu_seqlens, maa);
  std::vector<Tensor> out;
  std::vector<void*> pointers;
  for (int64_t j = 0; j < maa.size(0); ++j) {
    out.push_back(at::empty({call.rows(), x.size(2)}, x.options()));
    pointers.push_back(out.back().data_ptr());
  }
  token_mix_into(call, pointers.data());
  return out;
}

void token_mix_(at::TensorList blends, const Tensor& x, const optional<Tensor>& before,
                const optional<Tensor>& cu_seqlens, const Tensor& maa) {
  TORCH_CHECK(!blends.empty(), "token_mix_ needs blends");
  const Mix call(x, before, cu_seqlens, maa, blends);
  token_mix_into(call, call.mix.blends);
}

std::tuple<Tensor, Tensor, Tensor> token_mix_backward(at::TensorList douts, const Tensor& x,
                                                      const optional<Tensor>& before,
                                                      const optional<Tensor>& cu_seqlens,
                                                      const Tensor& maa, at::TensorList blends,
                                                      bool of_maa) {
  Mix call(x, before, cu_seqlens, maa, blends);
  const int64_t n = maa.size(0), C = x.size(2);
  TORCH_CHECK(static_cast<int64_t>(douts.size()) == n, "one gradient for each mixture");
  std::vector<Tensor> dense_douts;
  std::vector<const void*> pointers;
  for (const Tensor& dout : douts) {
    check(dout, {call.rows(), C}, x);
    dense_douts.push_back(dout.contiguous());
    pointers.push_back(dense_douts.back().const_data_ptr());
  }
  Tensor sum = at::empty({call.rows(), C}, x.options()), blended = at::empty_like(sum);
  Tensor dmaa = at::empty({of_maa ? n : 0, C}, x.options().dtype(at::kFloat));
  TokenMixGradients out = {pointers.data(), sum.data_ptr(), blended.data_ptr(),
                           of_maa ? dmaa.data_ptr<float>() : nullptr};
  call.for_bands(
      [&](int64_t i, int64_t j) { cpu_kernels().token_mix_backward(call.mix, out, i, j); });
  return {sum, blended, dmaa};
}

std::tuple<Tensor, Tensor> shift_backward(const Tensor& sum, const Tensor& blended,
                                          const optional<Tensor>& more, const Tensor& x,
                                          const optional<Tensor>& cu_seqlens, const Tensor& maa,
                                          bool of_before) {
  Mix call(x, std::nullopt, cu_seqlens, maa);
  for (const Tensor* part : {&sum, &blended}) {
    check(*part, {call.rows(), x.size(2)}, x);
    TORCH_CHECK(part->is_contiguous(), "the sums must be dense");
  }
  optional<Tensor> dense_more;
  if (more) {
    check(*more, sum.sizes(), x);
    dense_more = more->contiguous();
  }
  Tensor dx = at::empty(x.sizes(), x.options());
  Tensor dbefore = at::empty({of_before ? call.n_sequences() : 0, x.size(2)}, x.options());
  ShiftGradients out = {sum.const_data_ptr(),
                        blended.const_data_ptr(),
                        data_or_null(dense_more),
                        call.maa.const_data_ptr(),
                        dx.data_ptr(),
                        of_before ? dbefore.data_ptr() : nullptr};
  call.for_bands([&](int64_t i, int64_t j) { cpu_kernels().shift_backward(call.mix, out, i, j); });
  return {dx, dbefore};
}

// A GatedNorm and the memory it points to.
struct Norm {
  Tensor y, gate, weight, bias;
  GatedNorm norm;

  // y, gate (tokens, C), weight, bias (C)
  Norm(const Tensor& y_, const Tensor& gate_, const Tensor& weight_, const Tensor& bias_,
       int64_t groups, double eps)
      : y(y_.contiguous()),
        gate(gate_.contiguous()),
        weight(weight_.contiguous()),
        bias(bias_.contiguous()) {
    TORCH_CHECK(y.dim() == 2 && y.size(1) % groups == 0, "y must be (tokens, groups * size)");
    check(gate, y.sizes(), y);
    for (const Tensor* x : {&weight, &bias}) check(*x, {y.size(1)}, y);
    norm = {y.size(0),
            groups,
            y.size(1) / groups,
            static_cast<float>(eps),
            element_of(y),
            y.const_data_ptr(),
            gate.const_data_ptr(),
            weight.const_data_ptr(),
            bias.const_data_ptr()};
  }

  template <typename F>
  void for_groups(const F& function) const {
    in_parallel(norm.n_groups, y.numel(), function);
  }
};

Tensor gated_norm(const Tensor& y, const Tensor& gate, const Tensor& weight, const Tensor& bias,
                  int64_t groups, double eps) {
  Norm call(y, gate, weight, bias, groups, eps);
  Tensor out = at::empty(y.sizes(), y.options());
  void* data = out.data_ptr();
  call.for_groups([&](int64_t i, int64_t j) { cpu_kernels().gated_norm(call.norm, data, i, j); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_norm_backward(const Tensor& dout, const Tensor& y,
                                                               const Tensor& gate,
                                                               const Tensor& weight,
                                                               const Tensor& bias, int64_t groups,
                                                               double eps, bool of_weight) {
  Norm call(y, gate, weight, bias, groups, eps);
  check(dout, y.sizes(), y);
  Tensor from = dout.contiguous();
  Tensor dy = at::empty(y.sizes(), y.options()), dgate = at::empty_like(dy);
  auto floats = y.options().dtype(at::kFloat);
  Tensor dweight = at::empty({of_weight ? y.size(1) : 0}, floats), dbias = at::empty_like(dweight);
  GatedNormGradients out = {from.const_data_ptr(), dy.data_ptr(), dgate.data_ptr(),
                            of_weight ? dweight.data_ptr<float>() : nullptr,
                            of_weight ? dbias.data_ptr<float>() : nullptr};
  call.for_groups(
      [&](int64_t i, int64_t j) { cpu_kernels().gated_norm_backward(call.norm, out, i, j); });
  return {dy, dgate, dweight, dbias};
}

Tensor squared_relu(const Tensor& x) {
  Tensor from = x.contiguous(), y = at::empty(x.sizes(), x.options());
  void* data = y.data_ptr();
  in_parallel(y.numel(), y.numel(), [&](int64_t i, int64_t j) {
    cpu_kernels().squared_relu(element_of(from), from.const_data_ptr(), data, i, j);
  });
  return y;
}

Tensor squared_relu_backward(const Tensor& dy, const Tensor& y) {
  check(dy, y.sizes(), y);
  Tensor from = dy.contiguous(), result = y.contiguous(), dx = at::empty(y.sizes(), y.options());
  void* data = dx.data_ptr();
  in_parallel(dx.numel(), dx.numel(), [&](int64_t i, int64_t j) {
    cpu_kernels().squared_relu_backward(element_of(y), result.const_data_ptr(),
                                        from.const_data_ptr(), data, i, j);
  });
  return dx;
}

Tensor sigmoid_gate(const Tensor& gate, const Tensor& y) {
  check(gate, y.sizes(), y);
  Tensor gates = gate.contiguous(), values = y.contiguous(),
         out = at::empty(y.sizes(), y.options());
  void* data = out.data_ptr();
  in_parallel(out.numel(), out.numel(), [&](int64_t i, int64_t j) {
    cpu_kernels().sigmoid_gate(element_of(y), gates.const_data_ptr(), values.const_data_ptr(), data,
                               i, j);
  });
  return out;
}

std::tuple<Tensor, Tensor> sigmoid_gate_backward(const Tensor& dout, const Tensor& gate,
                                                 const Tensor& y) {
  check(gate, y.sizes(), y);
  check(dout, y.sizes(), y);
  Tensor gates = gate.contiguous(), values = y.contiguous(), from = dout.contiguous();
  Tensor dgate = at::empty(y.sizes(), y.options()), dy = at::empty_like(dgate);
  void *dgate_data = dgate.data_ptr(), *dy_data = dy.data_ptr();
  in_parallel(dy.numel(), dy.numel(), [&](int64_t i, int64_t j) {
    cpu_kernels().sigmoid_gate_backward(element_of(y), gates.const_data_ptr(),
                                        values.const_data_ptr(), from.const_data_ptr(), dgate_data,
                                        dy_data, i, j);
  });
  return {dgate, dy};
}

}  // namespace
}  // namespace finchtune

TORCH_LIBRARY_IMPL(finchtune, CPU, library) {
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
  finchtune::add_composites(library);
}

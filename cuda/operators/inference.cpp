// The torch operators that only inference calls, on a CPU: every check, all memory, and the calls
// into the kernels. They have no gradients.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "operators.h"

namespace finchtune {
namespace {

using at::Tensor;

constexpr int64_t kProductGrain = 1 << 15;  // multiplications that are worth a thread

// Products and the memory they point to.
struct Products {
  std::vector<Tensor> inputs, weights, outputs;
  std::vector<Product> items;
  std::vector<int64_t> ends;  // of each item's pieces of work, all items' numbered on
  int64_t operations = 0;

  Products(at::TensorList x, at::TensorList W, at::IntArrayRef activations) {
    TORCH_CHECK(!x.empty() && x.size() == W.size() && x.size() == activations.size(),
                "products: as many weights and activations as inputs");
    for (size_t i = 0; i < x.size(); ++i) add(x[i], W[i], activations[i]);
  }

  void add(const Tensor& x, const Tensor& W, int64_t activation) {
    TORCH_CHECK(x.dim() == 2 && W.dim() == 2 && x.size(1) == W.size(1) && x.size(1) > 0 &&
                    x.scalar_type() == W.scalar_type(),
                "products: x (rows, in) and W (out, in) of one dtype, not ", x.sizes(), " ",
                x.scalar_type(), " and ", W.sizes(), " ", W.scalar_type());
    TORCH_CHECK(0 <= activation && activation <= 2, "products: no activation ", activation);
    const Tensor wide = x.to(at::kFloat);
    inputs.push_back(wide.stride(1) == 1 ? wide : wide.contiguous());
    weights.push_back(W.contiguous());
    outputs.push_back(at::empty({x.size(0), W.size(0)}, x.options()));
    items.push_back({x.size(0), x.size(1), W.size(0), element_of(W),
                     inputs.back().const_data_ptr<float>(), inputs.back().stride(0),
                     weights.back().const_data_ptr(), outputs.back().data_ptr(),
                     static_cast<Activation>(activation)});
    const int64_t pieces = (W.size(0) + kProductOuts - 1) / kProductOuts;
    ends.push_back((ends.empty() ? 0 : ends.back()) + pieces);
    operations += x.numel() * W.size(0);
  }

  void run(int64_t first, int64_t last) const {
    for (size_t i = 0, begin = 0; i < items.size(); begin = ends[i++]) {
      const int64_t from = std::max<int64_t>(first, begin), to = std::min(last, ends[i]);
      if (from < to) cpu_kernels().product(items[i], from - begin, to - begin);
    }
  }
};

std::vector<Tensor> products(at::TensorList x, at::TensorList W, at::IntArrayRef activations) {
  Products call(x, W, activations);
  const int64_t pieces = call.ends.back();
  const int64_t grain = std::max<int64_t>(1, kProductGrain * pieces / (call.operations + 1));
  at::parallel_for(0, pieces, grain, [&](int64_t i, int64_t j) { call.run(i, j); });
  return call.outputs;
}

// W (n_out, in) as codes of blocks of 64 elements, scales (blocks) fp32, and what the codes stand
// for: a table of 16 or 256 values in fp32; whole numbers without one.
Tensor coded_product(const Tensor& x, const Tensor& any_codes, const Tensor& any_scales,
                     const std::optional<Tensor>& any_table, int64_t n_out, int64_t activation) {
  const Tensor wide = x.to(at::kFloat).contiguous(), codes = any_codes.contiguous(),
               scales = any_scales.contiguous();
  TORCH_CHECK(x.dim() == 2 && x.size(1) > 0 && n_out >= 0, "coded_product: x must be (rows, in)");
  TORCH_CHECK(0 <= activation && activation <= 2, "coded_product: no activation ", activation);
  Tensor table;
  Coding coding = Coding::kInteger;
  if (any_table) {
    table = any_table->contiguous();
    TORCH_CHECK((table.numel() == 16 || table.numel() == 256) && table.scalar_type() == at::kFloat,
                "coded_product: the table must have 16 or 256 values in fp32, not ", table.sizes());
    coding = table.numel() == 16 ? Coding::kHalfByte : Coding::kByte;
  }
  const int64_t n_in = x.size(1), blocks = (n_out * n_in + kCodedBlock - 1) / kCodedBlock;
  const int64_t bytes = coding == Coding::kHalfByte ? kCodedBlock / 2 : kCodedBlock;
  TORCH_CHECK(codes.sizes() == at::IntArrayRef({blocks, bytes}) && codes.element_size() == 1,
              "coded_product: codes must be bytes (", blocks, ", ", bytes, "), not ", codes.sizes(),
              " ", codes.scalar_type());
  TORCH_CHECK(scales.sizes() == at::IntArrayRef({blocks}) && scales.scalar_type() == at::kFloat,
              "coded_product: scales must be (", blocks, ") fp32, not ", scales.sizes());
  Tensor y = at::empty({x.size(0), n_out}, x.options());
  const Product product = {x.size(0),
                           n_in,
                           n_out,
                           element_of(x),
                           wide.const_data_ptr<float>(),
                           n_in,
                           nullptr,
                           y.data_ptr(),
                           static_cast<Activation>(activation)};
  const CodedProduct call = {product, coding, static_cast<const uint8_t*>(codes.const_data_ptr()),
                             scales.const_data_ptr<float>(),
                             any_table ? table.const_data_ptr<float>() : nullptr};
  const int64_t pieces = (n_out + kProductOuts - 1) / kProductOuts;
  const int64_t grain = std::max<int64_t>(1, kProductGrain * pieces / (n_out * n_in + 1));
  at::parallel_for(0, pieces, grain,
                   [&](int64_t i, int64_t j) { cpu_kernels().coded_product(call, i, j); });
  return y;
}

Tensor wkv6_step_(const Tensor& any_r, const Tensor& any_k, const Tensor& any_v,
                  const Tensor& any_w, const Tensor& any_u, Tensor& state) {
  const Tensor r = any_r.contiguous(), k = any_k.contiguous(), v = any_v.contiguous(),
               w = any_w.contiguous(), u = any_u.contiguous();
  TORCH_CHECK(u.dim() == 2 && u.scalar_type() == at::kFloat, "wkv6_step_: u must be (H, N) fp32");
  const int64_t H = u.size(0), N = u.size(1), B = r.size(0);
  TORCH_CHECK(0 < N && N <= kMaxHeadSize, "wkv6_step_: N must be at most ", kMaxHeadSize);
  for (const Tensor* x : {&r, &k, &v, &w})
    TORCH_CHECK(x->sizes() == at::IntArrayRef({B, H * N}) && x->scalar_type() == r.scalar_type(),
                "wkv6_step_: r, k, v, w must be (B, H N) of one dtype, not ", x->sizes());
  TORCH_CHECK(state.sizes() == at::IntArrayRef({B, H, N, N}) && state.is_contiguous() &&
                  state.scalar_type() == at::kFloat,
              "wkv6_step_: the state must be dense (B, H, N, N) fp32, not ", state.sizes());
  Tensor y = at::empty(r.sizes(), r.options());
  const Wkv6Step step = {H,
                         N,
                         element_of(r),
                         r.const_data_ptr(),
                         k.const_data_ptr(),
                         v.const_data_ptr(),
                         w.const_data_ptr(),
                         u.const_data_ptr<float>(),
                         state.data_ptr<float>(),
                         y.data_ptr()};
  at::parallel_for(0, B * H, 4, [&](int64_t i, int64_t j) { cpu_kernels().wkv6_step(step, i, j); });
  return y;
}

}  // namespace
}  // namespace finchtune

TORCH_LIBRARY_IMPL(finchtune, CPU, library) {
  library.impl("products", &finchtune::products);
  library.impl("coded_product", &finchtune::coded_product);
  library.impl("wkv6_step_", &finchtune::wkv6_step_);
}

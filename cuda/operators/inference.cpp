// The torch operators that only inference calls, on a CPU: every check, all memory, and the calls
// into the kernels. They have no gradients.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
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
  library.impl("wkv6_step_", &finchtune::wkv6_step_);
}

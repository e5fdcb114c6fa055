// The torch operators that read or make codes of few bits beside a product, on a GPU. They have no
// gradients.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../gpu/quantised.h"
#include "gpu_call.h"

namespace finchtune {
namespace {

using at::Tensor;

// The table of a 4-bit form. It lies in main memory, so that nothing waits for the device.
UnpackTable small_table(const std::optional<Tensor>& table) {
  UnpackTable values = {};
  if (!table || table->numel() != 16) return values;
  TORCH_CHECK(table->is_cpu() && table->scalar_type() == at::kFloat && table->is_contiguous(),
              "coded_product: the table must be dense, fp32 and in main memory");
  std::copy_n(table->const_data_ptr<float>(), 16, values.value);
  return values;
}

// As on a CPU (inference.cpp), for few rows and without an activation.
Tensor coded_product(const Tensor& any_x, const Tensor& any_codes, const Tensor& any_scales,
                     const std::optional<Tensor>& table, int64_t n_out, int64_t activation) {
  const GpuCall call(any_x);
  const Tensor x = dense(any_x), codes = dense(any_codes), scales = dense(any_scales);
  TORCH_CHECK(x.dim() == 2 && x.size(0) >= 1 && x.size(0) <= MOST_CODED_ROWS && x.size(1) > 0 &&
                  x.size(1) % 32 == 0 && activation == 0,
              "coded_product: at most ", +MOST_CODED_ROWS,
              " rows of x, whose length must be a multiple of 32, and no activation");
  const int kind = table && table->numel() == 16      ? UNPACK_TABLE
                   : codes.scalar_type() == at::kChar ? UNPACK_INT8
                                                      : UNPACK_E4M3;
  const int64_t blocks = (n_out * x.size(1) + 63) / 64;
  TORCH_CHECK(codes.numel() == blocks * (kind == UNPACK_TABLE ? 32 : 64) &&
                  codes.element_size() == 1 && scales.numel() == blocks &&
                  scales.scalar_type() == at::kFloat,
              "coded_product: blocks of 64 codes with a scale each");
  const UnpackTable values = small_table(table);
  Tensor y = at::empty({x.size(0), n_out}, x.options());
  GpuCall::succeed(finchtune_coded_product(
      elementwise_dtype(x), kind, &values, x.size(0), x.size(1), n_out, x.const_data_ptr(),
      codes.const_data_ptr(), scales.const_data_ptr<float>(), y.data_ptr(), call.stream));
  return y;
}

// The rows of x (T, n), their columns times factors (n), as e4m3 numbers and scales (T, 1).
std::tuple<Tensor, Tensor> fp8_rows(const Tensor& any_x, const std::optional<Tensor>& any_factors) {
  const GpuCall call(any_x);
  const Tensor x = dense(any_x);
  const std::optional<Tensor> factors = dense(any_factors);
  TORCH_CHECK(x.dim() == 2 && x.size(1) > 0 && x.size(1) % 16 == 0,
              "fp8_rows: x must be (T, n), n a multiple of 16");
  if (factors)
    TORCH_CHECK(factors->numel() == x.size(1) && factors->scalar_type() == at::kFloat,
                "fp8_rows: a factor in fp32 for each column");
  Tensor codes = at::empty(x.sizes(), x.options().dtype(at::kFloat8_e4m3fn));
  Tensor scales = floats({x.size(0), 1}, x);
  if (x.size(0) > 0)
    GpuCall::succeed(finchtune_fp8_rows(elementwise_dtype(x), x.size(0), x.size(1),
                                        x.const_data_ptr(), data_or_null<float>(factors),
                                        codes.data_ptr(), scales.data_ptr<float>(), call.stream));
  return {codes, scales};
}

Tensor turn_bytes(const Tensor& any_codes) {
  const GpuCall call(any_codes);
  const Tensor codes = dense(any_codes);
  TORCH_CHECK(codes.dim() == 2 && codes.element_size() == 1, "turn_bytes: a matrix of bytes");
  Tensor turned = at::empty({codes.size(1), codes.size(0)}, codes.options());
  GpuCall::succeed(finchtune_turn_bytes(codes.size(0), codes.size(1), codes.const_data_ptr(),
                                        turned.data_ptr(), call.stream));
  return turned;
}

}  // namespace
}  // namespace finchtune

TORCH_LIBRARY_IMPL(finchtune, CUDA, library) {
  library.impl("coded_product", &finchtune::coded_product);
  library.impl("fp8_rows", &finchtune::fp8_rows);
  library.impl("turn_bytes", &finchtune::turn_bytes);
}

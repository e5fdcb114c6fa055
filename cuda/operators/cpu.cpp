// The torch operators that exist on a CPU only, and the choice among the forms of its kernels.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <string>
#include <vector>

#include "operators.h"

namespace finchtune {
namespace {

using at::Tensor;

// The form of the CPU kernel in use; null until the first call.
std::atomic<const CpuPath*> chosen_cpu_path{nullptr};

std::vector<std::string> cpu_paths() {
  std::vector<std::string> names;
  for (int i = 0; i < kCpuPathCount; ++i)
    if (kCpuPaths[i].supported()) names.push_back(kCpuPaths[i].name);
  return names;
}

void use_cpu_path(const std::string& name) {
  for (int i = 0; i < kCpuPathCount; ++i) {
    if (kCpuPaths[i].supported() && (name == kCpuPaths[i].name || name == "fastest")) {
      chosen_cpu_path = &kCpuPaths[i];
      return;
    }
  }
  TORCH_CHECK(false, "this processor has no path named ", name);
}

Tensor cross_entropy_cpu(const Tensor& logits, const Tensor& labels, double l2wrap) {
  TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && labels.is_contiguous() &&
                  labels.sizes() == logits.sizes().slice(0, 1) && labels.scalar_type() == at::kLong,
              "cross_entropy_: logits must be dense (rows, V), labels (rows) int64");
  const Element element = element_of(logits);
  const int64_t rows = logits.size(0), n = logits.size(1);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i)
    TORCH_CHECK_INDEX(0 <= label[i] && label[i] < n, "cross_entropy_: label ", label[i],
                      " lies outside the vocabulary of ", n);
  Tensor losses = at::empty({rows}, logits.options().dtype(at::kFloat));
  void* data = logits.data_ptr();
  float* loss = losses.data_ptr<float>();
  at::parallel_for(0, rows, 1, [&](int64_t first, int64_t last) {
    cpu_kernels().cross_entropy(data, element, n, label, static_cast<float>(l2wrap), loss, first,
                                last);
  });
  return losses;
}

}  // namespace

const CpuKernels& cpu_kernels() {
  if (!chosen_cpu_path) use_cpu_path("fastest");
  return chosen_cpu_path.load()->kernels;
}

Element element_of(const Tensor& x) {
  const bool wide = x.scalar_type() == at::kFloat;
  TORCH_CHECK(wide || x.scalar_type() == at::kBFloat16, "the CPU kernels take fp32 and bf16, not ",
              x.scalar_type());
  return wide ? Element::kFloat32 : Element::kBfloat16;
}

std::vector<int64_t> sequence_bounds(const std::optional<Tensor>& cu_seqlens, int64_t B,
                                     int64_t T) {
  std::vector<int64_t> bounds;
  if (cu_seqlens) {
    const Tensor given = cu_seqlens->to(at::kLong).contiguous();
    const int64_t* data = given.const_data_ptr<int64_t>();
    bounds.assign(data, data + given.numel());
  } else {
    for (int64_t i = 0; i <= B; ++i) bounds.push_back(i * T);
  }
  for (size_t i = 1; i < bounds.size(); ++i)
    TORCH_CHECK(bounds[i - 1] <= bounds[i], "cu_seqlens must not fall");
  TORCH_CHECK(bounds.size() > 1 && bounds.front() == 0 && bounds.back() == B * T,
              "cu_seqlens must go from 0 to ", T);
  return bounds;
}

}  // namespace finchtune

TORCH_LIBRARY_FRAGMENT(finchtune, library) {
  library.def("cpu_paths() -> str[]", &finchtune::cpu_paths);
  library.def("use_cpu_path(str name) -> ()", &finchtune::use_cpu_path);
}

TORCH_LIBRARY_IMPL(finchtune, CPU, library) {
  library.impl("cross_entropy_", &finchtune::cross_entropy_cpu);
}

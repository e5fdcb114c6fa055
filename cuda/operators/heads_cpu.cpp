// How the operators of heads.h run on a CPU.

#include <ATen/Parallel.h>

#include <algorithm>

#include "composite.h"
#include "heads.h"
#include "operators.h"

namespace finchtune {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

auto kernel_of(HeadKernel kernel) {
  const CpuKernels& kernels = cpu_kernels();
  switch (kernel) {
    case HeadKernel::kWkv7Inputs:
      return kernels.wkv7_inputs;
    case HeadKernel::kWkv7InputsBackward:
      return kernels.wkv7_inputs_backward;
    case HeadKernel::kBonusNorm:
      return kernels.bonus_norm;
    default:
      return kernels.bonus_norm_backward;
  }
}

}  // namespace

void run_heads(const HeadCall& call) {
  const auto rows = pointers<const void*>(call.rows), weights = pointers<const void*>(call.weights);
  const auto out = pointers<void*>(call.out);
  const HeadParts parts = {call.tokens(),
                           call.heads,
                           call.channels() / call.heads,
                           static_cast<int64_t>(rows.size()),
                           call.eps,
                           element_of(call.rows[0]),
                           rows.data(),
                           weights.data(),
                           out.data(),
                           call.of_weights.defined() ? call.of_weights.data_ptr<float>() : nullptr};
  const auto kernel = kernel_of(call.kernel);
  const int64_t elements = std::max<int64_t>(1, call.rows[0].numel());
  at::parallel_for(0, call.heads, std::max<int64_t>(1, kGrain * call.heads / elements),
                   [&](int64_t first, int64_t last) { kernel(parts, first, last); });
}

}  // namespace finchtune

TORCH_LIBRARY_IMPL(finchtune, CPU, library) {
  finchtune::add_head_operators(library);
  finchtune::add_low_ranks(library);
}

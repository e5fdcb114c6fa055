// How the operators of heads.h run on a GPU.

#include "../gpu/heads.h"

#include "composite.h"
#include "gpu_call.h"
#include "heads.h"

namespace finchtune {

void run_heads(const HeadCall& call) {
  const at::Tensor& like = call.rows[0];
  TORCH_CHECK(like.numel() > 0, "heads: there must be tokens");
  const GpuCall on(like);
  const auto rows = pointers<const void*>(call.rows), weights = pointers<const void*>(call.weights);
  const auto out = pointers<void*>(call.out);
  const Heads heads = {call.tokens(),
                       call.heads,
                       call.channels() / call.heads,
                       call.eps,
                       elementwise_dtype(like),
                       static_cast<int32_t>(rows.size()),
                       static_cast<int32_t>(weights.size()),
                       static_cast<int32_t>(out.size()),
                       rows.data(),
                       weights.data(),
                       out.data()};
  const bool wanted = call.of_weights.defined();
  const at::Tensor scratch = bytes(wanted ? finchtune_heads_scratch_bytes(&heads) : 0, like);
  float* const dweights = wanted ? call.of_weights.data_ptr<float>() : nullptr;
  switch (call.kernel) {
    case HeadKernel::kWkv7Inputs:
      return GpuCall::succeed(finchtune_wkv7_inputs(&heads, on.stream));
    case HeadKernel::kWkv7InputsBackward:
      return GpuCall::succeed(finchtune_wkv7_inputs_backward(
          &heads, dweights, wanted ? scratch.data_ptr() : nullptr, on.stream));
    case HeadKernel::kBonusNorm:
      return GpuCall::succeed(finchtune_bonus_norm(&heads, on.stream));
    case HeadKernel::kBonusNormBackward:
      return GpuCall::succeed(finchtune_bonus_norm_backward(
          &heads, dweights, wanted ? scratch.data_ptr() : nullptr, on.stream));
  }
}

}  // namespace finchtune

TORCH_LIBRARY_IMPL(finchtune, CUDA, library) {
  finchtune::add_head_operators(library);
  finchtune::add_low_ranks(library);
}

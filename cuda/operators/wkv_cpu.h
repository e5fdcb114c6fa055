// What the WKV operators of all generations share on a CPU.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "operators.h"

namespace finchtune {

// A generation's call on a CPU: where its sequences lie, and its states.
template <typename Call>
struct OnCpu : Call {
  at::Tensor initial;  // state
  std::vector<int64_t> bounds;
  WkvShape shape;

  template <typename... Arguments>
  explicit OnCpu(const Arguments&... arguments) : Call(arguments...) {
    initial = or_zeros(this->state);
    bounds = sequence_bounds(this->cu_seqlens, this->B, this->T);
    shape = {this->n_sequences, this->H, this->N, bounds.data(), element_of(this->r())};
  }

  at::Tensor checkpoints(bool wanted) const {
    at::Tensor all = this->floats(checkpoint_shape(wanted));
    // The places that no sequence fills are never read, but equal calls give equal outputs.
    for (int64_t i = 0; wanted && i < this->n_sequences; ++i) {
      int64_t n_spans = (bounds[i + 1] - bounds[i] + kCheckpointSpan - 1) / kCheckpointSpan;
      int64_t filled = checkpoint_index(shape, i, 0) + n_spans;
      all.slice(0, filled, checkpoint_index(shape, i + 1, 0)).zero_();
    }
    return all;
  }

  std::vector<int64_t> checkpoint_shape(bool wanted = true) const {
    return {wanted ? checkpoint_count(shape) : 0, this->H, this->N, this->N};
  }

  // A tensor of states, which the kernels always read.
  at::Tensor or_zeros(const std::optional<at::Tensor>& states) const {
    return states ? *states : this->floats(this->state_shape()).zero_();
  }

  template <typename Function>
  void for_heads(const Function& function) const {
    at::parallel_for(0, this->n_sequences * this->H, 1, function);
  }
};

}  // namespace finchtune

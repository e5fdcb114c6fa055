// The gradient of u, summed over thread blocks.
#pragma once

#include "launch.cuh"
#include "problem.cuh"

namespace wkv6 {

// Gradient of u: for each head the sum over its thread blocks, always in the same order.
struct SumArgs {
  Wkv6Problem problem;
  Segments segments;
  const float* parts;  // (thread blocks, N)
  float* sum;          // (H, N)
};

__global__ void __launch_bounds__(THREADS) sum_kernel(SumArgs args) {
  const Wkv6Problem& problem = args.problem;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= problem.H * problem.N) return;
  const int64_t rest = Segments::heads(problem) - args.segments.whole;
  float sum = 0.0f;
  for (int64_t head = i / problem.N; head < Segments::heads(problem); head += problem.H) {
    const bool whole = head < args.segments.whole;
    for (int64_t segment = 0; segment < (whole ? 1 : args.segments.per_head); segment++) {
      sum += args.parts[(head + segment * rest) * problem.N + i % problem.N];
    }
  }
  args.sum[i] = sum;
}

inline cudaError_t launch_sum(const Wkv6Problem& p, Segments segments, const float* parts,
                              float* sum, void* stream) {
  return finchtune::launch(sum_kernel, finchtune::ceil_div(p.H * p.N, THREADS), THREADS, 0, stream,
                           SumArgs{p, segments, parts, sum});
}

}  // namespace wkv6

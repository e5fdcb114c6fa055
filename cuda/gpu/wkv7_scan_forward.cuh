// The forward of the scan of WKV7 (wkv7_scan.cuh).
#pragma once

#include "wkv7_scan.cuh"

namespace wkv7 {

template <typename T>
struct ForwardArgs {
  Wkv6Problem problem;
  const T* rows[INPUT_ROWS];
  const float* state_in;
  T* y;
  float *state_out, *checkpoints;
};

template <typename T, int ELEMENTS>
__global__ void __launch_bounds__(Place<ELEMENTS>::MOST_THREADS)
    scan_forward_kernel(ForwardArgs<T> args) {
  const Wkv6Problem& problem = args.problem;
  const Work work(problem, wkv6::uncut_segments(problem), blockIdx.x);
  const Place<ELEMENTS> place(problem.N);
  const int64_t matrix = problem.N * problem.N, state = work.state_index(problem) * matrix;
  Tokens& tokens = finchtune::shared_memory<Tokens>();
  tokens.clear();
  Part<ELEMENTS> S;
  S.load(place, args.state_in == nullptr ? nullptr : args.state_in + state);
  for (int t0 = 0; t0 < work.length; t0 += STEP) {
    const int count = smaller(STEP, work.length - t0);
    tokens.load(args.rows, INPUT_ROWS, problem, work, t0, count);
    if (args.checkpoints != nullptr && t0 % CHUNK == 0)
      S.store(place, args.checkpoints + work.checkpoint_index(problem, t0 / CHUNK) * matrix);
    for (int i = 0; i < count; i++) {
      S.advance(place, tokens, i);
      const float y = S.dot(place, tokens.at[R][i]);
      if (place.leads()) args.y[work.token_offset(problem, t0 + i) + place.row] = from_float<T>(y);
    }
  }
  if (args.state_out != nullptr) S.store(place, args.state_out + state);
}

}  // namespace wkv7

// The forward of the scan (scan.cuh).
#pragma once

#include "scan.cuh"

namespace wkv6 {

template <typename T>
struct ScanForwardArgs {
  Wkv6Problem problem;
  const T *r, *k, *v, *w;
  const float *u, *state_in;
  T* y;
  float *state_out, *checkpoints;  // a checkpoint is (N value, N key)
};

constexpr int SCAN_FORWARD_ROWS = 3;  // r, k, decay

template <typename T>
__global__ void __launch_bounds__(128) scan_forward_kernel(ScanForwardArgs<T> args) {
  const Wkv6Problem& problem = args.problem;
  const Work work(problem, uncut_segments(args.problem), blockIdx.x);
  const int n = static_cast<int>(problem.N), channel = threadIdx.x;
  const bool active = channel < n;  // threads come in whole warps
  const int64_t state_offset = work.state_index(problem) * n * n;
  ScanShared shared(n);
  Tokens *const r = shared.tokens(0), *const k = shared.tokens(1), *const d = shared.tokens(2);
  const float* const u = args.u + work.head * n;

  for (int key = 0; active && key < n; key++) {
    shared.at(key, channel) =
        args.state_in == nullptr ? 0.0f : args.state_in[state_offset + key * n + channel];
  }
  for (int64_t t0 = 0; t0 < work.length; t0 += STEP) {
    if (active) {
      r[channel] = load_tokens(args.r, problem, work, t0, channel);
      k[channel] = load_tokens(args.k, problem, work, t0, channel);
      d[channel] = decay_of(load_tokens(args.w, problem, work, t0, channel, NO_DECAY));
    }
    __syncthreads();
    if (active && args.checkpoints != nullptr && t0 % CHUNK == 0) {
      float* const checkpoint =
          args.checkpoints + work.checkpoint_index(problem, t0 / CHUNK) * n * n;
      for (int value = 0; value < n; value++) {
        checkpoint[value * n + channel] = shared.at(channel, value);
      }
    }
    __syncthreads();
    if (active) {
      const Tokens v = load_tokens(args.v, problem, work, t0, channel);
      Tokens y = {};
      for (int key = 0; key < n; key++) {
        float s = shared.at(key, channel);
#pragma unroll
        for (int i = 0; i < STEP; i++) {
          const float kv = k[key].x[i] * v.x[i];
          y.x[i] += r[key].x[i] * (s + u[key] * kv);
          s = d[key].x[i] * s + kv;
        }
        shared.at(key, channel) = s;
      }
      store_tokens(args.y, y, problem, work, t0, channel);
    }
    __syncthreads();
  }
  for (int key = 0; active && args.state_out != nullptr && key < n; key++) {
    args.state_out[state_offset + key * n + channel] = shared.at(key, channel);
  }
}

}  // namespace wkv6

// The backward of the scan (scan.cuh).
#pragma once

#include "scan.cuh"

namespace wkv6 {

template <typename T>
struct ScanBackwardArgs {
  Wkv6Problem problem;
  const T *r, *k, *v, *w, *dy;
  const float *u, *dstate_out, *checkpoints;
  T *dr, *dk, *dv, *dw;
  float *du, *dstate_in;  // du: (n_seq, H, N)
  float* step_states;     // (n_seq, H, STEPS - 1, N value, N key)
};

// Rows of tokens in shared memory; the last holds dA, 8 x 8.
enum ScanBackwardRow { ROW_R, ROW_K, ROW_DECAY, ROW_V, ROW_DY, ROW_DA, SCAN_BACKWARD_ROWS };

// Writes the states before the steps of a chunk after its first, (N value, N key) each. A thread
// writes its key channel, and is the one that reads it again.
template <typename T>
__device__ void store_step_states(const ScanBackwardArgs<T>& args, const Work& work, int64_t t0,
                                  int steps, const float* checkpoint, float* step_states,
                                  ScanShared& shared, int channel, bool active) {
  const int n = shared.n;
  Tokens* const v = shared.tokens(ROW_V);
  const float* before = checkpoint;
  for (int step = 0; step + 1 < steps; step++, t0 += STEP) {
    __syncthreads();  // the last step's v is no longer read
    if (active) v[channel] = load_tokens(args.v, args.problem, work, t0, channel);
    __syncthreads();
    if (!active) continue;
    const Tokens k = load_tokens(args.k, args.problem, work, t0, channel);
    const Tokens d = decay_of(load_tokens(args.w, args.problem, work, t0, channel, NO_DECAY));
    float* const after = step_states + static_cast<int64_t>(step) * n * n;
    for (int value = 0; value < n; value++) {
      float s = before[value * n + channel];
#pragma unroll
      for (int i = 0; i < STEP; i++) s = d.x[i] * s + k.x[i] * v[value].x[i];
      after[value * n + channel] = s;
    }
    before = after;
  }
}

// dr, dk, dw of a step for one key channel. Inputs: the products with the state before the step,
// state_r = dY S^T, and with the gradient after it, state_k = V G^T, sum_v S G, and dA. The
// gradient of the log decay is summed directly, as in backward.cuh.
struct StepGradients {
  Tokens dr, dk, dw;
  float du = 0.0f;

  __device__ __forceinline__ StepGradients(const Tokens& r, const Tokens& k, const Tokens& w,
                                           const Tokens& d, const Tokens& state_r,
                                           const Tokens& state_k, float state_gradient,
                                           const float* da, float u) {
    float product = 1.0f;
    float prefix = 0.0f, suffix = 0.0f;
#pragma unroll
    for (int i = 0; i < STEP; i++) {
      dr.x[i] = product * state_r.x[i];
      product *= d.x[i];
    }
    const float through = product * state_gradient;
    product = 1.0f;
#pragma unroll
    for (int i = STEP - 1; i >= 0; i--) {
      dk.x[i] = product * state_k.x[i];
      product *= d.x[i];
      dw.x[i] = through + suffix;
      suffix += r.x[i] * dr.x[i];
    }
#pragma unroll
    for (int i = 0; i < STEP; i++) {
      dw.x[i] += prefix;
      prefix += k.x[i] * dk.x[i];
    }
#pragma unroll
    for (int j = 0; j < STEP; j++) {
      const float diagonal = da[j * STEP + j];
      dr.x[j] += diagonal * u * k.x[j];
      dk.x[j] += diagonal * u * r.x[j];
      du += diagonal * r.x[j] * k.x[j];
      float decayed = 1.0f;
#pragma unroll
      for (int i = j + 1; i < STEP; i++) {
        const float pair = da[i * STEP + j] * decayed;
        dr.x[i] += pair * k.x[j];
        dk.x[j] += pair * r.x[i];
        const float crossing = pair * k.x[j] * r.x[i];
#pragma unroll
        for (int t = j + 1; t < i; t++) dw.x[t] += crossing;
        decayed *= d.x[i];
      }
    }
#pragma unroll
    for (int i = 0; i < STEP; i++) dw.x[i] *= log_decay_of(w.x[i]);
  }
};

// dv of a step for one value channel; takes G to the step's start.
__device__ __forceinline__ Tokens step_dv(ScanShared& shared, const Tokens& dy, const float* u,
                                          int channel) {
  const Tokens *const r = shared.tokens(ROW_R), *const k = shared.tokens(ROW_K),
                      *const d = shared.tokens(ROW_DECAY);
  Tokens dv = {};
  for (int key = 0; key < shared.n; key++) {
    float g = shared.at(key, channel);
#pragma unroll
    for (int i = STEP - 1; i >= 0; i--) {
      const float rdy = r[key].x[i] * dy.x[i];
      dv.x[i] += k[key].x[i] * (g + u[key] * rdy);
      g = d[key].x[i] * g + rdy;
    }
    shared.at(key, channel) = g;
  }
  return dv;
}

// One step of the backward; returns its share of the gradient of u.
template <typename T>
__device__ float backward_step(const ScanBackwardArgs<T>& args, const Work& work, int64_t t0,
                               const float* state, const float* u, ScanShared& shared, int channel,
                               bool active) {
  const Wkv6Problem& problem = args.problem;
  const int n = shared.n;
  Tokens *const v = shared.tokens(ROW_V), *const dy = shared.tokens(ROW_DY);
  float* const da = shared.tokens(ROW_DA)->x;
  Tokens r, k, w, d;
  __syncthreads();  // the last step is no longer read
  if (active) {
    r = load_tokens(args.r, problem, work, t0, channel);
    k = load_tokens(args.k, problem, work, t0, channel);
    w = load_tokens(args.w, problem, work, t0, channel, NO_DECAY);
    d = decay_of(w);
    shared.tokens(ROW_R)[channel] = r;
    shared.tokens(ROW_K)[channel] = k;
    shared.tokens(ROW_DECAY)[channel] = d;
    v[channel] = load_tokens(args.v, problem, work, t0, channel);
    dy[channel] = load_tokens(args.dy, problem, work, t0, channel);
  }
  __syncthreads();
  for (int pair = threadIdx.x; pair < STEP * STEP; pair += blockDim.x) {
    float sum = 0.0f;
    for (int value = 0; value < n; value++) {
      sum += dy[value].x[pair / STEP] * v[value].x[pair % STEP];
    }
    da[pair] = sum;
  }
  Tokens state_r = {}, state_k = {};
  float state_gradient = 0.0f;
  for (int value = 0; active && value < n; value++) {
    const float s = state[value * n + channel], g = shared.at(channel, value);
    state_gradient += s * g;
#pragma unroll
    for (int i = 0; i < STEP; i++) {
      state_r.x[i] += s * dy[value].x[i];
      state_k.x[i] += g * v[value].x[i];
    }
  }
  __syncthreads();  // dA is complete, and G is no longer read along its rows
  if (!active) return 0.0f;
  const StepGradients gradients(r, k, w, d, state_r, state_k, state_gradient, da, u[channel]);
  const Tokens dv = step_dv(shared, dy[channel], u, channel);
  store_tokens(args.dr, gradients.dr, problem, work, t0, channel);
  store_tokens(args.dk, gradients.dk, problem, work, t0, channel);
  store_tokens(args.dw, gradients.dw, problem, work, t0, channel);
  store_tokens(args.dv, dv, problem, work, t0, channel);
  return gradients.du;
}

template <typename T>
__global__ void __launch_bounds__(128, 1) scan_backward_kernel(ScanBackwardArgs<T> args) {
  const Wkv6Problem& problem = args.problem;
  const Work work(problem, uncut_segments(args.problem), blockIdx.x);
  const int n = static_cast<int>(problem.N), channel = threadIdx.x;
  const bool active = channel < n;  // threads come in whole warps
  const int64_t state_offset = work.state_index(problem) * n * n;
  float* const step_states =
      args.step_states + static_cast<int64_t>(blockIdx.x) * (STEPS - 1) * n * n;
  const float* const u = args.u + work.head * n;
  ScanShared shared(n);  // its state is G, the gradient of the state

  for (int key = 0; active && key < n; key++) {
    shared.at(key, channel) =
        args.dstate_out == nullptr ? 0.0f : args.dstate_out[state_offset + key * n + channel];
  }
  float du = 0.0f;
  for (int chunk = work.chunks() - 1; chunk >= 0; chunk--) {
    const int64_t t0 = static_cast<int64_t>(chunk) * CHUNK;
    const int64_t rest = work.length - t0;
    const int steps = rest < CHUNK ? static_cast<int>((rest + STEP - 1) / STEP) : STEPS;
    const float* const checkpoint =
        args.checkpoints + work.checkpoint_index(problem, chunk) * n * n;
    store_step_states(args, work, t0, steps, checkpoint, step_states, shared, channel, active);
    for (int step = steps - 1; step >= 0; step--) {
      const float* const state =
          step == 0 ? checkpoint : step_states + static_cast<int64_t>(step - 1) * n * n;
      du += backward_step(args, work, t0 + step * STEP, state, u, shared, channel, active);
    }
  }
  if (active) args.du[static_cast<int64_t>(blockIdx.x) * n + channel] = du;
  for (int key = 0; active && args.dstate_in != nullptr && key < n; key++) {
    args.dstate_in[state_offset + key * n + channel] = shared.at(key, channel);
  }
}

}  // namespace wkv6

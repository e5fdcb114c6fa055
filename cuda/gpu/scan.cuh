// The scan: the recurrence itself in fp32, for every head size, dtype and length. A thread block
// does one head of one sequence, eight tokens at a time; thread i owns value channel i of the state
// in some loops, key channel i in others. It is also the kernel for decoding, where the tensor
// cores have no work.
#pragma once

#include "problem.cuh"

namespace wkv6 {

constexpr int STEP = 8;  // tokens between two barriers
constexpr int STEPS = CHUNK / STEP;

// Eight tokens of one channel.
struct __align__(16) Tokens {
  float x[STEP];
};

// Loads the tokens from t0 on of a channel; `missing` stands for those beyond the sequence.
template <typename T>
__device__ __forceinline__ Tokens load_tokens(const T* tensor, const Wkv6Problem& problem,
                                              const Work& work, int64_t t0, int channel,
                                              float missing = 0.0f) {
  Tokens tokens;
#pragma unroll
  for (int i = 0; i < STEP; i++) {
    const bool valid = t0 + i < work.length;
    tokens.x[i] = valid ? to_float(tensor[work.token_offset(problem, t0 + i) + channel]) : missing;
  }
  return tokens;
}

template <typename T>
__device__ __forceinline__ void store_tokens(T* tensor, const Tokens& tokens,
                                             const Wkv6Problem& problem, const Work& work,
                                             int64_t t0, int channel) {
#pragma unroll
  for (int i = 0; i < STEP; i++) {
    if (t0 + i < work.length) {
      tensor[work.token_offset(problem, t0 + i) + channel] = from_float<T>(tokens.x[i]);
    }
  }
}

// w of a token that does not exist: its decay is exp(-exp(w)) = 1.
constexpr float NO_DECAY = -INFINITY;

// -exp(w), finite for any w, as the gradient of w is a multiple of it; NaN passes.
__device__ __forceinline__ float log_decay_of(float w) { return -expf(w > 80.0f ? 80.0f : w); }

__device__ __forceinline__ Tokens decay_of(const Tokens& w) {
  Tokens d;
#pragma unroll
  for (int i = 0; i < STEP; i++) d.x[i] = expf(log_decay_of(w.x[i]));
  return d;
}

// The whole dynamic shared memory of a scan: a state and some rows of tokens, for `n` channels. A
// state's rows are one longer than they need be, so that a column lies in different banks.
struct ScanShared {
  int n;
  float* state;

  __device__ __forceinline__ explicit ScanShared(int n) : n(n), state(&shared_memory<float>()) {}
  __device__ __forceinline__ float& at(int key, int value) { return state[key * (n + 1) + value]; }
  // n is a multiple of 8, so the rows of tokens begin at a multiple of 16 bytes.
  __device__ __forceinline__ Tokens* tokens(int row) {
    return reinterpret_cast<Tokens*>(state + n * (n + 1)) + row * n;
  }
};

constexpr size_t scan_shared_bytes(int64_t n, int rows) {
  return (n * (n + 1) + rows * n * STEP) * sizeof(float);
}

}  // namespace wkv6

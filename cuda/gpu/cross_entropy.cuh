// The cross entropy of a row of logits, and its gradient in their place.
#pragma once

#include "vectors.cuh"

namespace finchtune {

constexpr int LOSS_THREADS = 512;

template <typename T>
struct CrossEntropyArgs {
  int64_t rows, n;
  T* logits;
  const int64_t* labels;
  float l2wrap;
  float* losses;
};

// The largest of a row so far, its first place, and the sum of e^(x - largest).
struct Largest {
  float value, sum;
  int place;

  __device__ __forceinline__ void join(const Largest& other) {
    const bool theirs =
        other.value > value || (other.value == value && other.place < place) || value != value;
    const float most = other.value > value ? other.value : value;
    // Where both are minus infinity their difference is no number; there is nothing to add then.
    const float mine = value == most ? sum : sum * expf(value - most);
    sum = mine + (other.value == most ? other.sum : other.sum * expf(other.value - most));
    place = theirs ? other.place : place;
    value = most;
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(LOSS_THREADS) cross_entropy_kernel(CrossEntropyArgs<T> args) {
  Largest(&found)[LOSS_THREADS] = shared_memory<Largest[LOSS_THREADS]>();
  T* const row = args.logits + static_cast<int64_t>(blockIdx.x) * args.n;
  const int64_t label = args.labels[blockIdx.x];
  const int thread = threadIdx.x;
  Largest mine = {-INFINITY, 0.0f, static_cast<int>(args.n)};
  for (int64_t at = thread * V; at < args.n; at += LOSS_THREADS * V) {
    load<V>(row + at).each([&](float x, int i) { mine.join({x, 1.0f, static_cast<int>(at) + i}); });
  }
  found[thread] = mine;
  __syncthreads();
  for (int half = LOSS_THREADS / 2; half > 0; half /= 2) {
    if (thread < half) found[thread].join(found[thread + half]);
    __syncthreads();
  }
  const Largest all = found[0];
  const bool inside = label >= 0 && label < args.n;
  if (thread == 0)
    args.losses[blockIdx.x] = inside ? logf(all.sum) + all.value - to_float(row[label]) : NAN;
  __syncthreads();  // the label's logit has been read
  for (int64_t at = thread * V; at < args.n; at += LOSS_THREADS * V) {
    Floats<V> x = load<V>(row + at);
    x.each([&](float& logit, int i) {
      logit = expf(logit - all.value) / all.sum - (at + i == label ? 1.0f : 0.0f) +
              (at + i == all.place ? args.l2wrap * all.value : 0.0f);
    });
    store<V>(row + at, x);
  }
}

}  // namespace finchtune

// Layer norm joined with the residual sum before it, a row for each thread block. A row is read once:
// each thread keeps its elements in shared memory, where no other thread touches them.
#pragma once

#include "norm.h"
#include "vectors.cuh"

namespace finchtune {

constexpr int ADDED_NORM_STRIPE = 64;  // rows whose gradients of weight and bias one thread adds up
constexpr int BLOCK_WARPS = ELEMENTWISE_THREADS / 32;

// The sums of two values over the thread block; `parts` is used for no other.
__device__ __forceinline__ float2 block_sums(float2 x, float2 (&parts)[BLOCK_WARPS]) {
  x = {warp_sum(x.x), warp_sum(x.y)};
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  float2 sums = {};
#pragma unroll
  for (int i = 0; i < BLOCK_WARPS; i++) sums = {sums.x + parts[i].x, sums.y + parts[i].y};
  return sums;
}

// What a thread block shares, and behind it rows of its elements.
struct NormShared {
  float2 parts[2][BLOCK_WARPS];

  template <typename T>
  __device__ __forceinline__ T* row(int i, int64_t channels) {
    return reinterpret_cast<T*>(this + 1) + i * channels;
  }
};

// f(first element) for all that the thread has of a row.
template <int V, typename F>
__device__ __forceinline__ void each_of_row(int64_t channels, F f) {
#pragma unroll 1  // thread blocks beside each other hide the loads, if registers leave them room
  for (int64_t at = threadIdx.x * V; at < channels; at += ELEMENTWISE_THREADS * V) f(at);
}

template <typename T>
struct AddedNormArgs {
  int64_t rows, channels;
  float eps;
  const T *x, *y, *weight, *bias;
  T *total, *normed;
  float2* moments;
};

template <typename T, int V>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS) added_norm_kernel(AddedNormArgs<T> args) {
  NormShared& shared = shared_memory<NormShared>();
  T* const row = shared.row<T>(0, args.channels);
  const int64_t begin = blockIdx.x * args.channels, C = args.channels;
  float sum = 0.0f, squares = 0.0f;
  each_of_row<V>(C, [&](int64_t at) {
    Floats<V> x = load<V>(args.x + begin + at);
    if (args.y != nullptr) {
      const Floats<V> y = load<V>(args.y + begin + at);
      x.each([&](float& value, int e) { value += y.x[e]; });
      store<V>(args.total + begin + at, x);
    }
    store<V>(row + at, x);
    load<V>(row + at).each([&](float value, int) { sum += value; });  // as it was rounded
  });
  const float mean = block_sums({sum, 0.0f}, shared.parts[0]).x / C;
  each_of_row<V>(C, [&](int64_t at) {
    load<V>(row + at).each([&](float x, int) { squares += (x - mean) * (x - mean); });
  });
  const float scale = rsqrtf(block_sums({squares, 0.0f}, shared.parts[1]).x / C + args.eps);
  each_of_row<V>(C, [&](int64_t at) {
    const Floats<V> weight = load<V>(args.weight + at), bias = load<V>(args.bias + at);
    Floats<V> x = load<V>(row + at);
    x.each([&](float& value, int e) { value = (value - mean) * scale * weight.x[e] + bias.x[e]; });
    store<V>(args.normed + begin + at, x);
  });
  if (threadIdx.x == 0) args.moments[blockIdx.x] = {mean, scale};
}

template <typename T>
struct AddedNormBackwardArgs {
  int64_t rows, channels;
  const T *total, *weight, *dnormed, *dtotal;
  const float2* moments;
  T* dx;
};

// With n the normal value and g = dnormed weight: dx = scale (g - mean g - n mean(g n)) + dtotal.
template <typename T, int V>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    added_norm_backward_kernel(AddedNormBackwardArgs<T> args) {
  NormShared& shared = shared_memory<NormShared>();
  const int64_t begin = blockIdx.x * args.channels, C = args.channels;
  T *const row = shared.row<T>(0, C), *const drow = shared.row<T>(1, C);
  const float2 moments = args.moments[blockIdx.x];
  // f(first element, normal values, g)
  const auto each = [&](const T* total, const T* dnormed, auto f) {
    each_of_row<V>(C, [&](int64_t at) {
      Floats<V> n = load<V>(total + at), g = load<V>(dnormed + at);
      const Floats<V> weight = load<V>(args.weight + at);
      n.each([&](float& x, int) { x = (x - moments.x) * moments.y; });
      g.each([&](float& x, int e) { x *= weight.x[e]; });
      f(at, n, g);
    });
  };
  each_of_row<V>(C, [&](int64_t at) {
    store<V>(row + at, load<V>(args.total + begin + at));
    store<V>(drow + at, load<V>(args.dnormed + begin + at));
  });
  float sum = 0.0f, along = 0.0f;
  each(row, drow, [&](int64_t, Floats<V>& n, Floats<V>& g) {
    g.each([&](float x, int e) {
      sum += x;
      along += x * n.x[e];
    });
  });
  const float2 sums = block_sums({sum, along}, shared.parts[0]);
  const float mean = sums.x / C, slope = sums.y / C;
  each(row, drow, [&](int64_t at, Floats<V>& n, Floats<V>& g) {
    Floats<V> d = {};
    if (args.dtotal != nullptr) d = load<V>(args.dtotal + begin + at);
    d.each([&](float& x, int e) { x += moments.y * (g.x[e] - mean - n.x[e] * slope); });
    store<V>(args.dx + begin + at, d);
  });
}

template <typename T>
struct AddedNormWeightArgs {
  AddedNormBackwardArgs<T> norm;
  Stripes stripes;
  float* parts;  // (stripes, 2, channels): of weight and bias
};

template <typename T>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    added_norm_weight_kernel(AddedNormWeightArgs<T> args) {
  const AddedNormBackwardArgs<T>& norm = args.norm;
  const int channel = args.stripes.column();
  if (channel >= args.stripes.n_columns) return;
  float dweight = 0.0f, dbias = 0.0f;
  for (int64_t row = args.stripes.first(); row < args.stripes.last(); row++) {
    const float2 moments = norm.moments[row];
    const int64_t at = row * norm.channels + channel;
    const float d = to_float(norm.dnormed[at]);
    dweight += d * (to_float(norm.total[at]) - moments.x) * moments.y;
    dbias += d;
  }
  float* const parts = args.parts + args.stripes.stripe() * 2 * norm.channels;
  parts[channel] = dweight;
  parts[norm.channels + channel] = dbias;
}

}  // namespace finchtune

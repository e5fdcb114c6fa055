// Elements that a thread moves at once, and the sharing out of rows of them among thread blocks.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device.cuh"
#include "elementwise.h"
#include "launch.cuh"

namespace finchtune {

constexpr int ELEMENTWISE_THREADS = 128;

// As aligned as 16 bytes are, even where it is longer: tensors begin at a multiple of those.
template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T x[V];
};

// V elements in fp32.
template <int V>
struct Floats {
  float x[V];

  template <typename F>
  __device__ __forceinline__ void each(F f) {
#pragma unroll
    for (int i = 0; i < V; i++) f(x[i], i);
  }
};

template <int V, typename T>
__device__ __forceinline__ Floats<V> load(const T* from) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
  Floats<V> floats;
#pragma unroll
  for (int i = 0; i < V; i++) floats.x[i] = to_float(pack.x[i]);
  return floats;
}

template <int V, typename T>
__device__ __forceinline__ void store(T* to, const Floats<V>& floats) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; i++) pack.x[i] = from_float<T>(floats.x[i]);
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

constexpr int GROUP_LANES = 8;  // that share a token's group of channels, or head

// Over the lanes of a group.
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
  for (int mask = 1; mask < GROUP_LANES; mask *= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// The sum over a warp, for each of its lanes.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// Thread blocks that each take a stripe of rows and as many columns as they have threads, V wide.
struct Stripes {
  int64_t rows, tall;          // tall: rows of a stripe
  int32_t n_columns, n_tiles;  // of V channels; of columns, to a stripe

  Stripes(int64_t rows, int64_t channels, int V, int64_t tall)
      : rows(rows),
        tall(tall),
        n_columns(static_cast<int32_t>(channels / V)),
        n_tiles(static_cast<int32_t>(ceil_div(channels / V, ELEMENTWISE_THREADS))) {}
  int64_t count() const { return ceil_div(rows, tall); }
  int64_t blocks() const { return count() * n_tiles; }
  __device__ int64_t stripe() const { return blockIdx.x / n_tiles; }
  __device__ int column() const {
    return static_cast<int>(blockIdx.x % n_tiles) * ELEMENTWISE_THREADS + threadIdx.x;
  }
  __device__ int64_t first() const { return stripe() * tall; }
  __device__ int64_t last() const {
    const int64_t end = first() + tall;
    return end < rows ? end : rows;
  }
};

// Calls f(element, width) with a value of the dtype's type and how many of them are 16 bytes, as a
// type: 1 where `wide`(that many) says that they cannot move together.
template <typename W, typename F>
cudaError_t with_vectors(int dtype, W wide, F f) {
  const auto choose = [&](auto element) {
    constexpr int V = 16 / sizeof(element);
    if (wide(V)) return f(element, std::integral_constant<int, V>());
    return f(element, std::integral_constant<int, 1>());
  };
  switch (dtype) {
    case ELEMENTWISE_FP32:
      return choose(float());
    case ELEMENTWISE_BF16:
      return choose(__nv_bfloat16());
    case ELEMENTWISE_FP16:
      return choose(__half());
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename T>
const T* in(const void* pointer) {
  return static_cast<const T*>(pointer);
}
template <typename T>
T* out(void* pointer) {
  return static_cast<T*>(pointer);
}

// Sums over the parts of stripes, always in the same order: parts (count, width) -> sums (width).
struct SumPartsArgs {
  const float* parts;
  float* sums;
  int64_t count, width;
};

static __global__ void __launch_bounds__(ELEMENTWISE_THREADS) sum_parts_kernel(SumPartsArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * ELEMENTWISE_THREADS + threadIdx.x;
  if (i >= args.width) return;
  float sum = 0.0f;
  for (int64_t part = 0; part < args.count; part++) sum += args.parts[part * args.width + i];
  args.sums[i] = sum;
}

inline cudaError_t sum_parts(const float* parts, float* sums, int64_t count, int64_t width,
                             void* stream) {
  return launch(sum_parts_kernel, ceil_div(width, ELEMENTWISE_THREADS), ELEMENTWISE_THREADS, 0,
                stream, SumPartsArgs{parts, sums, count, width});
}

}  // namespace finchtune

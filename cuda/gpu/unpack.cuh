// Quantised weights as numbers again.
#pragma once

#include "vectors.cuh"

namespace finchtune {

constexpr int UNPACKED = 8;      // elements that a thread makes
constexpr int QUANT_BLOCK = 64;  // elements that share a scale

template <typename T>
struct UnpackArgs {
  int64_t count;
  const unsigned char* codes;
  const float* scales;
  UnpackTable table;
  T* out;
};

// An e4m3 number: a sign, four bits of exponent (bias 7) and three of mantissa; no infinities.
__device__ __forceinline__ float e4m3(uint32_t code) {
  const uint32_t exponent = code >> 3 & 15, mantissa = code & 7, sign = (code & 128) << 24;
  const float tiny = static_cast<float>(mantissa) * 0.001953125f;  // 2^-9
  if (exponent == 0) return sign != 0 ? -tiny : tiny;
  return __uint_as_float(sign | (exponent + 120) << 23 | mantissa << 20);
}

// Element `i` of the eight whose codes begin at `codes`, without its scale.
template <int KIND>
__device__ __forceinline__ float decode(const unsigned char* codes, const float* table, int i) {
  if (KIND == UNPACK_TABLE) return table[i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15];
  if (KIND == UNPACK_INT8) return static_cast<float>(static_cast<signed char>(codes[i]));
  return e4m3(codes[i]);
}

template <typename T, int V, int KIND>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS) unpack_kernel(UnpackArgs<T> args) {
  float (&table)[16] = shared_memory<float[16]>();
  if (KIND == UNPACK_TABLE) {
#pragma unroll
    for (int i = 0; i < 16; i++)
      if (threadIdx.x == i) table[i] = args.table.value[i];
    __syncthreads();
  }
  constexpr int BYTES = KIND == UNPACK_TABLE ? UNPACKED / 2 : UNPACKED;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * ELEMENTWISE_THREADS + threadIdx.x;
  const int64_t at = index * UNPACKED;
  if (at >= args.count) return;
  const auto codes = reinterpret_cast<const Pack<unsigned char, BYTES>*>(args.codes)[index];
  const float scale = args.scales[at / QUANT_BLOCK];
#pragma unroll
  for (int i = 0; i < UNPACKED; i += V) {
    if (at + i >= args.count) return;
    Floats<V> values;
    values.each([&](float& x, int e) { x = decode<KIND>(codes.x, table, i + e) * scale; });
    store<V>(args.out + at + i, values);
  }
}

}  // namespace finchtune

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

// An e4m3 number: a sign, four bits of exponent (bias 7) and three of mantissa; no infinities. In
// the place of an fp32's, whose bias is larger by 120, they stand for 2^-120 of it, also where they
// are subnormal.
__device__ __forceinline__ float e4m3(uint32_t code) {
  const float shifted = __uint_as_float((code & 128) << 24 | (code & 127) << 20);
  return shifted * __uint_as_float(247u << 23);  // 2^120
}

// The table of a kernel's arguments in shared memory, where threads index it; nothing for other
// kinds. All threads of the block call it.
template <int KIND, typename Args>
__device__ __forceinline__ const float* table_of(const Args& args) {
  if (KIND != UNPACK_TABLE) return nullptr;
  float (&table)[16] = shared_memory<float[16]>();
  if (threadIdx.x < 16) table[threadIdx.x] = args.table.value[threadIdx.x];
  __syncthreads();
  return table;
}

// Element `i` of those whose codes begin at `codes`, without its scale.
template <int KIND>
__device__ __forceinline__ float decode(const unsigned char* codes, const float* table, int i) {
  if (KIND == UNPACK_TABLE) return table[i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15];
  if (KIND == UNPACK_INT8) return static_cast<float>(static_cast<signed char>(codes[i]));
  return e4m3(codes[i]);
}

template <typename T, int V, int KIND>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    unpack_kernel(const __grid_constant__ UnpackArgs<T> args) {
  const float* const table = table_of<KIND>(args);
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

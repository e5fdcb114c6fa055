// Factors of products in fp8: rows rounded to e4m3, and codes turned.
#pragma once

#include "vectors.cuh"

namespace finchtune {

constexpr float LARGEST_E4M3 = 448.0f;

// The e4m3 number nearest to x, the even one of two, for |x| <= 448 but for rounding.
__device__ __forceinline__ uint32_t e4m3_code(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 128, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 127;  // NaN
  if (magnitude >= 121u << 23) {           // from 2^-6 on: three bits of mantissa
    const uint32_t rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1);
    const uint32_t code = (rounded >> 20) - (120 << 3);
    return sign | (code < 126 ? code : 126);
  }
  // Below, multiples of 2^-9: adding 2^14 leaves them in the last bits.
  return sign | (__float_as_uint(__uint_as_float(magnitude) + 16384.0f) & 15);
}

// The larger of two magnitudes; NaN if one is.
__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }

template <typename T>
struct Fp8RowsArgs {
  int64_t n;
  const T* x;
  const float* factors;
  unsigned char* codes;
  float* scales;
};

// A row for each thread block.
template <typename T>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS) fp8_rows_kernel(Fp8RowsArgs<T> args) {
  constexpr int V = 16 / sizeof(T);
  float (&most)[ELEMENTWISE_THREADS] = shared_memory<float[ELEMENTWISE_THREADS]>();
  const int64_t begin = blockIdx.x * args.n;
  const int thread = threadIdx.x;
  const auto each = [&](auto f) {
    for (int64_t at = thread * V; at < args.n; at += ELEMENTWISE_THREADS * V) {
      Floats<V> x = load<V>(args.x + begin + at);
      if (args.factors != nullptr) {
#pragma unroll
        for (int i = 0; i < V; i += 4) {
          const Floats<4> factors = load<4>(args.factors + at + i);
#pragma unroll
          for (int e = 0; e < 4; e++) x.x[i + e] *= factors.x[e];
        }
      }
      f(at, x);
    }
  };
  float mine = 0.0f;
  each(
      [&](int64_t, Floats<V>& x) { x.each([&](float v, int) { mine = larger(fabsf(v), mine); }); });
  most[thread] = mine;
  __syncthreads();
  for (int half = ELEMENTWISE_THREADS / 2; half > 0; half /= 2) {
    if (thread < half) most[thread] = larger(most[thread], most[thread + half]);
    __syncthreads();
  }
  const float scale = most[0] / LARGEST_E4M3;
  if (thread == 0) args.scales[blockIdx.x] = scale;
  const float divisor = scale == 0.0f ? 1.0f : scale;
  each([&](int64_t at, Floats<V>& x) {
    Pack<unsigned char, V> codes;
    x.each(
        [&](float v, int i) { codes.x[i] = static_cast<unsigned char>(e4m3_code(v / divisor)); });
    *reinterpret_cast<Pack<unsigned char, V>*>(args.codes + begin + at) = codes;
  });
}

constexpr int TURNED = 64;                                               // side of a tile of bytes
constexpr int TURNED_WORDS = TURNED * TURNED / 4 / ELEMENTWISE_THREADS;  // of a thread

struct TurnBytesArgs {
  int64_t rows, columns;
  const unsigned char* from;
  unsigned char* to;
};

// A tile for each thread block. A row of words in shared memory is one longer than the tile, so that
// the words which a warp reads below each other lie in different banks.
static __global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    turn_bytes_kernel(TurnBytesArgs args) {
  using Tile = unsigned char[TURNED][TURNED + 4];
  Tile& tile = shared_memory<Tile>();
  const int64_t across = (args.columns + TURNED - 1) / TURNED;
  const int64_t top = blockIdx.x / across * TURNED, left = blockIdx.x % across * TURNED;
  for (int i = 0; i < TURNED_WORDS; i++) {
    const int word = i * ELEMENTWISE_THREADS + threadIdx.x;
    const int row = word / (TURNED / 4), column = word % (TURNED / 4) * 4;
    if (top + row >= args.rows || left + column >= args.columns) continue;
    *reinterpret_cast<uint32_t*>(&tile[row][column]) =
        *reinterpret_cast<const uint32_t*>(args.from + (top + row) * args.columns + left + column);
  }
  __syncthreads();
  for (int i = 0; i < TURNED_WORDS; i++) {
    const int word = i * ELEMENTWISE_THREADS + threadIdx.x;
    const int row = word % (TURNED / 4) * 4, column = word / (TURNED / 4);
    if (top + row >= args.rows || left + column >= args.columns) continue;
    Pack<unsigned char, 4> four;
#pragma unroll
    for (int j = 0; j < 4; j++) four.x[j] = tile[row + j][column];
    *reinterpret_cast<Pack<unsigned char, 4>*>(args.to + (left + column) * args.rows + top + row) =
        four;
  }
}

}  // namespace finchtune

// Few rows times a quantised weight, which is read once and never written out: for writing text.
//
// Such a product takes as long as reading the weight. A warp makes one or two of the outputs; a lane
// takes 16 bytes of their codes at a time, which share a scale, and the elements of x beside them,
// which all warps find in the cache.
#pragma once

#include "quantised.h"
#include "unpack.cuh"

namespace finchtune {

constexpr int CODED_WARPS = ELEMENTWISE_THREADS / 32;
constexpr int CODED_BYTES = 16;  // that a lane loads at a time

template <typename T>
struct CodedProductArgs {
  int64_t rows, n_in, n_out;
  const T* x;
  const unsigned char* codes;
  const float* scales;
  UnpackTable table;
  T* y;
};

// ROWS is at least args.rows: those beyond are computed as the last one, and not stored. So are
// outputs beyond the last.
template <typename T, int KIND, int ROWS>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS, 1)
    coded_product_kernel(const __grid_constant__ CodedProductArgs<T> args) {
  constexpr int OUTS = ROWS > 1 ? 2 : 1;  // of a warp: they share the loads of x
  constexpr int CHUNK = KIND == UNPACK_TABLE ? 2 * CODED_BYTES : CODED_BYTES;  // elements of a lane
  constexpr int V = 16 / sizeof(T);
  constexpr int AHEAD = ROWS > 1 ? 1 : 4;  // loads of codes on their way at a time
  const float* const table = table_of<KIND>(args);
  const int lane = threadIdx.x % 32;
  const int64_t first = (blockIdx.x * static_cast<int64_t>(CODED_WARPS) + threadIdx.x / 32) * OUTS;
  float sums[OUTS][ROWS] = {};
#pragma unroll AHEAD
  for (int64_t at = lane * CHUNK; at < args.n_in; at += 32 * CHUNK) {
    Pack<unsigned char, CODED_BYTES> codes[OUTS];
    float scales[OUTS], parts[OUTS][ROWS] = {};
#pragma unroll
    for (int o = 0; o < OUTS; o++) {
      const int64_t out = first + o < args.n_out ? first + o : args.n_out - 1;
      const int64_t element = out * args.n_in + at;
      codes[o] =
          reinterpret_cast<const Pack<unsigned char, CODED_BYTES>*>(args.codes)[element / CHUNK];
      scales[o] = args.scales[element / QUANT_BLOCK];
    }
#pragma unroll
    for (int i = 0; i < CHUNK; i += V) {
      Floats<V> weights[OUTS];
#pragma unroll
      for (int o = 0; o < OUTS; o++)
        weights[o].each([&](float& w, int e) { w = decode<KIND>(codes[o].x, table, i + e); });
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const int64_t row = r < args.rows ? r : args.rows - 1;
        load<V>(args.x + row * args.n_in + at + i).each([&](float x, int e) {
#pragma unroll
          for (int o = 0; o < OUTS; o++) parts[o][r] += weights[o].x[e] * x;
        });
      }
    }
#pragma unroll
    for (int o = 0; o < OUTS; o++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) sums[o][r] += scales[o] * parts[o][r];
  }
#pragma unroll
  for (int o = 0; o < OUTS; o++)
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float sum = warp_sum(sums[o][r]);
      if (lane == 0 && r < args.rows && first + o < args.n_out)
        args.y[r * args.n_out + first + o] = from_float<T>(sum);
    }
}

}  // namespace finchtune

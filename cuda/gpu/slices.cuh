// The slices of the state, or of its gradient, that a warp of the tensor-core kernels keeps in
// registers.
#pragma once

#include "fragments.cuh"

namespace wkv6 {

// 16 rows x 64 columns, the rows of a warp.
struct Slice {
  Accumulator x[SLICES];

  // Calls f(element, row, column) for all that the lane holds.
  template <typename F>
  __device__ __forceinline__ void each(const Lane& lane, F f) {
#pragma unroll
    for (int j = 0; j < SLICES; j++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int row = 16 * lane.warp + lane.row + i / 2 % 2 * 8;
        f(x[j].x[i], row, 16 * j + i / 4 * 8 + 2 * lane.quad + i % 2);
      }
    }
  }
};

// Values by keys.
struct ValueSlice : Slice {};

// Keys by values.
struct KeySlice : Slice {
  // x = diag(total) x + keys values, keys (keys x tokens) in registers, the values' tile rows from
  // `row`.
  __device__ __forceinline__ void advance(const float (&total)[2], const Operand& keys,
                                          Tile& values, int row, const Lane& lane) {
#pragma unroll
    for (int j = 0; j < SLICES; j++) {
#pragma unroll
      for (int i = 0; i < 8; i++) x[j].x[i] *= total[i / 2 % 2];
      multiply_add(x[j], keys, values.load_transposed_right(row, 16 * j, lane));
    }
  }
};

}  // namespace wkv6

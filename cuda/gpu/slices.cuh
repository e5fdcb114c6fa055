// The slices of the state, or of its gradient, that a warp of the tensor-core kernels keeps in
// registers.
#pragma once

#include "fragments.cuh"

namespace wkv6 {

// The 16 values x 64 keys of the state that a warp owns.
struct ValueSlice {
  Accumulator x[SLICES];

  // Calls f(element, value channel, key channel) for all that the lane holds.
  template <typename F>
  __device__ __forceinline__ void each(const Lane& lane, F f) {
#pragma unroll
    for (int j = 0; j < SLICES; j++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int value = 16 * lane.warp + lane.row + i / 2 % 2 * 8;
        f(x[j].x[i], value, 16 * j + i / 4 * 8 + 2 * lane.quad + i % 2);
      }
    }
  }
};

// The 16 keys x 64 values of the state, or of its gradient, that a warp owns.
struct KeySlice {
  Accumulator x[SLICES];

  // Calls f(element, key channel, value channel) for all that the lane holds.
  template <typename F>
  __device__ __forceinline__ void each(const Lane& lane, F f) {
#pragma unroll
    for (int j = 0; j < SLICES; j++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int key = 16 * lane.warp + lane.row + i / 2 % 2 * 8;
        f(x[j].x[i], key, 16 * j + i / 4 * 8 + 2 * lane.quad + i % 2);
      }
    }
  }

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

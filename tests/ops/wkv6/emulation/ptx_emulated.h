// The functions of ptx.cuh on the CPU, with the register layouts that its head describes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cfloat>

namespace wkv6 {

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0.0f : y;
}

inline void async_copy_16(void* shared, const void* global, bool valid) {
  const emulation::Copy copy{shared, valid ? global : nullptr};
  copy.begin(emulation::eager_copies);
  emulation::current->open_copies.push_back(copy);
}

inline void prefetch_to_level_2(const void*) {}

inline void async_commit() {
  emulation::Fiber& fiber = *emulation::current;
  fiber.copy_groups.push_back(std::move(fiber.open_copies));
  fiber.open_copies.clear();
}

template <int PENDING>
void async_wait() {
  auto& groups = emulation::current->copy_groups;
  while (groups.size() > PENDING) {
    for (const emulation::Copy& copy : groups.front()) copy.end();
    groups.erase(groups.begin());
  }
}

inline uint32_t two_halves(uint32_t low, uint32_t high) { return low | high << 16; }

// Element (row, column) of matrix m, of which lane 8m + row gave the address of the row.
inline uint16_t matrix_element(const emulation::Contribution* lanes, int m, int row, int column) {
  return static_cast<const uint16_t*>(lanes[8 * m + row].pointer)[column];
}

inline const emulation::Contribution* collect_rows(int kind, const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::last_error = "ldmatrix: unaligned row";
  emulation::Contribution mine{kind};
  mine.pointer = row;
  return emulation::collect(mine);
}

inline void load_matrices(uint32_t (&x)[4], const void* row) {
  const auto* const lanes = collect_rows(emulation::LOAD_MATRICES, row);
  const int g = emulation::lane() / 4, q = emulation::lane() % 4;
  for (int m = 0; m < 4; m++) {
    x[m] = two_halves(matrix_element(lanes, m, g, 2 * q), matrix_element(lanes, m, g, 2 * q + 1));
  }
}

inline void load_matrices_transposed(uint32_t (&x)[4], const void* row) {
  const auto* const lanes = collect_rows(emulation::LOAD_MATRICES_TRANSPOSED, row);
  const int g = emulation::lane() / 4, q = emulation::lane() % 4;
  for (int m = 0; m < 4; m++) {
    x[m] = two_halves(matrix_element(lanes, m, 2 * q, g), matrix_element(lanes, m, 2 * q + 1, g));
  }
}

inline uint32_t transpose_matrix(uint32_t x) {
  emulation::Contribution mine{emulation::TRANSPOSE_MATRIX, {x}};
  const auto* const lanes = emulation::collect(mine);
  const int g = emulation::lane() / 4, q = emulation::lane() % 4;
  const auto element = [lanes](int row, int column) {
    return lanes[4 * row + column / 2].words[0] >> 16 * (column % 2) & 0xffff;
  };
  return two_halves(element(2 * q, g), element(2 * q + 1, g));
}

inline float half_of(uint32_t pair, int half) {
  return __uint_as_float(half == 0 ? pair << 16 : pair & 0xffff0000u);
}

inline void mma_bf16(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto* const lanes = emulation::collect({emulation::MMA, {a[0], a[1], a[2], a[3], b0, b1}});
  const int g = emulation::lane() / 4, q = emulation::lane() % 4;
  for (int k = 0; k < 16; k++) {
    const int pair = k % 8 / 2, right = k / 8;
    for (int element = 0; element < 4; element++) {
      const int lower = element / 2, column = 2 * q + element % 2;
      c[element] += half_of(lanes[4 * g + pair].words[2 * right + lower], k % 2) *
                    half_of(lanes[4 * column + pair].words[4 + right], k % 2);
    }
  }
}

}  // namespace wkv6

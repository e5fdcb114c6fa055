// The instructions that CUDA C++ has no name for, one small function each; no PTX stands elsewhere.
//
// A warp holds an 8x8 matrix of 16-bit values as one 32-bit register per lane: lane 4g + q has row
// g, columns 2q (low half) and 2q + 1 (high half). The host build of the tests replaces this file's
// functions by ones that emulate the same layouts, one CUDA thread per fiber.
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>

#include <cstdint>

// Instructions of compute capability 8.0. Kernels with them are compiled for older GPUs too, so that
// the rest of the library works there, but never launched.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define FINCHTUNE_SM_80(...) __trap()
#else
#define FINCHTUNE_SM_80(...) asm volatile(__VA_ARGS__)
#endif

namespace wkv6 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 2^x with a relative error of 2^-22; results below 2^-126 become 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Starts copying 16 bytes from global to shared memory, or writing 16 zero bytes where `valid` is
// false; the source is then not read.
__device__ __forceinline__ void async_copy_16(void* shared, const void* global, bool valid) {
  FINCHTUNE_SM_80("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                  "l"(global), "r"(valid ? 16 : 0) : "memory");
}

// Has the line that this address lies in brought to the level-2 cache.
__device__ __forceinline__ void prefetch_to_level_2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Closes the group of copies that this thread has started since the last call.
__device__ __forceinline__ void async_commit() {
  FINCHTUNE_SM_80("cp.async.commit_group;" :: : "memory");
}

// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING>
__device__ __forceinline__ void async_wait() {
  FINCHTUNE_SM_80("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Loads four 8x8 matrices; lane 8m + i gives the address of row i of matrix m (16 bytes, aligned).
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

// Transposes an 8x8 matrix in registers.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// c (16x8, fp32) += a (16x16, bf16) b (16x8, bf16). a is four 8x8 matrices (upper left, lower left,
// upper right, lower right), b two, transposed (b0 rows 0-7, b1 rows 8-15), c two (rows 0-7:
// c[0..1], rows 8-15: c[2..3]).
__device__ __forceinline__ void mma_bf16(float* c, const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  FINCHTUNE_SM_80(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};" : "+f"(c[0]),
      "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0),
      "r"(b1));
}

}  // namespace wkv6

#else
#include "ptx_emulated.h"
#endif

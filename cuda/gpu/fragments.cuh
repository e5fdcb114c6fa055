// 16x16 matrices spread over the lanes of a warp, the products of two of them, and the
// shared-memory tiles that they are loaded from. Everything in the tensor-core kernels is built
// from these.
//
// A product has the form C[m][n] += sum_k A[m][k] B[n][k]: both factors run along k in memory, so
// one kind of operand serves both sides. Lane 4g + q holds of a fragment M (a pair is two
// neighbours in a row):
//
//   pair 0: M[g][2q, 2q+1]       pair 2: M[g][8+2q, 8+2q+1]
//   pair 1: M[g+8][2q, 2q+1]     pair 3: M[g+8][8+2q, 8+2q+1]
//
// Token order. Recurrences advance by blocks of 16 tokens, and inside a block by leaves of four. A
// tile keeps the tokens of a block in an interleaved order, so that the four columns a lane holds
// (2q, 2q+1, 8+2q, 8+2q+1) of a channels x tokens fragment are the four tokens 4q .. 4q+3 of leaf
// q, in order. Only the loads from and stores to global memory and the masks know of it.
#pragma once

#include "problem.cuh"
#include "ptx.cuh"

namespace wkv6 {

using bf16 = __nv_bfloat16;

constexpr int HEAD_SIZE = 64;  // the only one that the tensor-core kernels are written for
constexpr int BLOCK = 16;      // tokens of a recurrence step
constexpr int BLOCKS = CHUNK / BLOCK;
constexpr int WARPS =
    4;  // of a thread block; each owns 16 of the 64 channels, or one block of tokens
constexpr int THREADS = 32 * WARPS;
constexpr int SLICES = HEAD_SIZE / 16;

// Place of a thread: lane 4 * row + quad of its warp.
struct Lane {
  int warp, lane, row, quad;
  __device__ Lane() {
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    row = lane / 4;
    quad = lane % 4;
  }
};

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// bf16 is the upper half of fp32.
__device__ __forceinline__ float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

// A factor of a product: four pairs of bf16.
struct Operand {
  uint32_t pair[4];
};

// A sum of products: x[2p], x[2p + 1] are pair p.
struct Accumulator {
  float x[8] = {};
};

// What a lane holds of a channels x tokens fragment: channels g (first index 0) and g + 8 (1), the
// four tokens of leaf q.
struct Leaf {
  float x[2][4];
};

__device__ __forceinline__ Leaf as_leaf(const Operand& m) {
  Leaf leaf;
#pragma unroll
  for (int c = 0; c < 2; c++) {
    leaf.x[c][0] = low_half(m.pair[c]);
    leaf.x[c][1] = high_half(m.pair[c]);
    leaf.x[c][2] = low_half(m.pair[2 + c]);
    leaf.x[c][3] = high_half(m.pair[2 + c]);
  }
  return leaf;
}

__device__ __forceinline__ Leaf as_leaf(const Accumulator& m) {
  Leaf leaf;
#pragma unroll
  for (int c = 0; c < 2; c++) {
    leaf.x[c][0] = m.x[2 * c];
    leaf.x[c][1] = m.x[2 * c + 1];
    leaf.x[c][2] = m.x[4 + 2 * c];
    leaf.x[c][3] = m.x[4 + 2 * c + 1];
  }
  return leaf;
}

__device__ __forceinline__ Operand as_operand(const Leaf& leaf) {
  return {pack(leaf.x[0][0], leaf.x[0][1]), pack(leaf.x[1][0], leaf.x[1][1]),
          pack(leaf.x[0][2], leaf.x[0][3]), pack(leaf.x[1][2], leaf.x[1][3])};
}

__device__ __forceinline__ Operand as_operand(const Accumulator& m) {
  return {pack(m.x[0], m.x[1]), pack(m.x[2], m.x[3]), pack(m.x[4], m.x[5]), pack(m.x[6], m.x[7])};
}

__device__ __forceinline__ Operand transposed(const Operand& m) {
  return {transpose_matrix(m.pair[0]), transpose_matrix(m.pair[2]), transpose_matrix(m.pair[1]),
          transpose_matrix(m.pair[3])};
}

// c[m][n] += sum_k a[m][k] b[n][k]
__device__ __forceinline__ void multiply_add(Accumulator& c, const Operand& a, const Operand& b) {
  mma_bf16(c.x, a.pair, b.pair[0], b.pair[2]);
  mma_bf16(c.x + 4, a.pair, b.pair[1], b.pair[3]);
}

// (64, 64) bf16 in shared memory. The eight 16-byte pieces of a row are permuted by the row number:
// the eight rows that ldmatrix reads at one column then lie in different banks.
struct Tile {
  bf16 x[CHUNK * HEAD_SIZE];

  __device__ __forceinline__ bf16* at(int row, int column) {
    return x + row * HEAD_SIZE + ((column / 8 ^ row % 8) * 8 + column % 8);
  }

  // m[i][k] = tile[row + i][column + k]
  __device__ __forceinline__ Operand load(int row, int column, const Lane& lane) {
    Operand m;
    load_matrices(m.pair, at(row + lane.lane % 16, column + lane.lane / 16 * 8));
    return m;
  }

  // m[i][k] = tile[row + k][column + i]
  __device__ __forceinline__ Operand load_transposed(int row, int column, const Lane& lane) {
    Operand m;
    load_matrices_transposed(
        m.pair, at(row + lane.lane % 8 + lane.lane / 16 * 8, column + lane.lane / 8 % 2 * 8));
    return m;
  }

  // tile[row + i][column + k] = m[i][k]
  __device__ __forceinline__ void store(int row, int column, const Operand& m, const Lane& lane) {
#pragma unroll
    for (int p = 0; p < 4; p++) {
      bf16* const target = at(row + lane.row + p % 2 * 8, column + p / 2 * 8 + 2 * lane.quad);
      *reinterpret_cast<uint32_t*>(target) = m.pair[p];
    }
  }
};

// An operand in shared memory, kept as the registers of the lanes.
struct SharedOperand {
  uint4 lanes[32];

  __device__ __forceinline__ void store(const Operand& m, const Lane& lane) {
    lanes[lane.lane] = {m.pair[0], m.pair[1], m.pair[2], m.pair[3]};
  }
  __device__ __forceinline__ Operand load(const Lane& lane) const {
    const uint4 m = lanes[lane.lane];
    return {m.x, m.y, m.z, m.w};
  }
};

// Row of a tile that holds token t of a chunk: bits 3, 2, 1, 0 of t go to bits 2, 1, 3, 0.
__device__ __forceinline__ int tile_row(int t) {
  return (t & ~15) | (t & 12) >> 1 | (t & 2) << 2 | (t & 1);
}

// Starts loading the chunk that begins at token t0 of the segment, this head's channels, into a
// tile; tokens beyond the segment become zeros.
__device__ __forceinline__ void load_chunk(Tile& tile, const bf16* tensor,
                                           const Wkv6Problem& problem, const Work& work,
                                           int64_t t0) {
#pragma unroll
  for (int piece = threadIdx.x; piece < CHUNK * HEAD_SIZE / 8; piece += THREADS) {
    const int t = piece / 8, channel = piece % 8 * 8;
    const bool valid = t0 + t < work.length;
    const int64_t offset = work.token_offset(problem, valid ? t0 + t : 0) + channel;
    async_copy_16(tile.at(tile_row(t), channel), tensor + offset, valid);
  }
}

__device__ __forceinline__ void store_chunk(bf16* tensor, Tile& tile, const Wkv6Problem& problem,
                                            const Work& work, int64_t t0) {
#pragma unroll
  for (int piece = threadIdx.x; piece < CHUNK * HEAD_SIZE / 8; piece += THREADS) {
    const int t = piece / 8, channel = piece % 8 * 8;
    if (t0 + t < work.length) {
      bf16* const target = tensor + work.token_offset(problem, t0 + t) + channel;
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<uint4*>(tile.at(tile_row(t), channel));
    }
  }
}

// Tokens of the chunk at t0 that belong to the segment.
__device__ __forceinline__ int valid_tokens(const Work& work, int64_t t0) {
  const int64_t rest = work.length - t0;
  return rest < CHUNK ? static_cast<int>(rest) : CHUNK;
}

// Blocks that so many tokens fill or begin.
__device__ __forceinline__ int used_blocks(int valid) { return (valid + BLOCK - 1) / BLOCK; }

}  // namespace wkv6

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
// q, in order: bits 3, 2, 1, 0 of a token's number in its block are bits 2, 1, 3, 0 of its row's. Only
// the loads from and stores to global memory and the masks know of it.
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

// Place of a thread: lane 4 * row + quad of its warp; and where in a tile it begins to load and to
// store 16x16 matrices, in bytes.
struct Lane {
  int warp, lane, row, quad;
  int load_place, transposed_place, store_place;
  __device__ Lane() {
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    row = lane / 4;
    quad = lane % 4;
    load_place = tile_place(lane % 16, lane / 16);
    transposed_place = tile_place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    store_place = tile_place(row, 0) + 4 * quad;
  }
  // Of 16-byte piece `piece` of row `row` of a tile.
  static __device__ __forceinline__ int tile_place(int row, int piece) {
    return row * 128 + (piece ^ row % 8) * 16;
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

// The same as the right factor of a product, its middle pairs exchanged: the tensor cores want two
// neighbouring registers for each half, and ldmatrix fills four of them in order.
struct RightOperand {
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

__device__ __forceinline__ Operand chosen(bool condition, const Operand& a, const Operand& b) {
  Operand m;
#pragma unroll
  for (int p = 0; p < 4; p++) m.pair[p] = condition ? a.pair[p] : b.pair[p];
  return m;
}

// c[m][n] += sum_k a[m][k] b[n][k]
__device__ __forceinline__ void multiply_add(Accumulator& c, const Operand& a, const Operand& b) {
  mma_bf16(c.x, a.pair, b.pair[0], b.pair[2]);
  mma_bf16(c.x + 4, a.pair, b.pair[1], b.pair[3]);
}
__device__ __forceinline__ void multiply_add(Accumulator& c, const Operand& a,
                                             const RightOperand& b) {
  mma_bf16(c.x, a.pair, b.pair[0], b.pair[1]);
  mma_bf16(c.x + 4, a.pair, b.pair[2], b.pair[3]);
}

// (64, 64) bf16 in shared memory. The eight 16-byte pieces of a row are permuted by the row number:
// the eight rows that ldmatrix reads at one column then lie in different banks. `row` and `column`
// are multiples of 16 below, so a column only flips bits of the lane's own place.
struct alignas(16) Tile {
  bf16 x[CHUNK * HEAD_SIZE];

  __device__ __forceinline__ unsigned char* at(int place) {
    return reinterpret_cast<unsigned char*>(x) + place;
  }
  static __device__ __forceinline__ int moved(int place, int row, int column) {
    return (place + row * 128) ^ (column * 2);
  }

  // m[i][k] = tile[row + i][column + k]
  __device__ __forceinline__ Operand load(int row, int column, const Lane& lane) {
    Operand m;
    load_matrices(m.pair, at(moved(lane.load_place, row, column)));
    return m;
  }

  // m[i][k] = tile[row + k][column + i]
  __device__ __forceinline__ Operand load_transposed(int row, int column, const Lane& lane) {
    Operand m;
    load_matrices_transposed(m.pair, at(moved(lane.transposed_place, row, column)));
    return m;
  }

  // The same as right factors: the lanes' addresses give the order of the matrices.
  __device__ __forceinline__ RightOperand load_right(int row, int column, const Lane& lane) {
    RightOperand m;
    load_matrices(m.pair, at(moved(lane.transposed_place, row, column)));
    return m;
  }
  __device__ __forceinline__ RightOperand load_transposed_right(int row, int column,
                                                                const Lane& lane) {
    RightOperand m;
    load_matrices_transposed(m.pair, at(moved(lane.load_place, row, column)));
    return m;
  }

  // tile[row + i][column + k] = m[i][k]
  __device__ __forceinline__ void store(int row, int column, const Operand& m, const Lane& lane) {
    const int place = moved(lane.store_place, row, column);
#pragma unroll
    for (int p = 0; p < 4; p++) {
      *reinterpret_cast<uint32_t*>(at((place ^ p / 2 * 16) + p % 2 * 1024)) = m.pair[p];
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

// What a thread moves between the tensors and the tiles: eight channels of four tokens of a chunk, in
// rows i, i + 8, i + 4 and i + 12 of a block's tile rows. A warp moves the block whose number it has,
// so that what it does with that block alone needs no barrier but its own.
struct Pieces {
  bool in_leaves;    // the tile's rows are in the interleaved order, not in that of the tokens
  int token, place;  // the first of the tokens, and where its piece lies in a tile, in bytes
  int step;          // elements from a token to the next in a tensor
  int64_t offset;    // of the first piece of the segment

  __device__ Pieces(const Wkv6Problem& problem, const Work& work, bool in_leaves = true)
      : in_leaves(in_leaves) {
    const int i = threadIdx.x / 8 % 4, block = threadIdx.x / 32 * BLOCK;
    token = block + (in_leaves ? (i & 2) * 2 + (i & 1) : i);
    place = Lane::tile_place(block + i, threadIdx.x % 8);
    step = static_cast<int>(HEAD_SIZE * problem.H);
    offset = work.token_offset(problem, token) + threadIdx.x % 8 * 8;
  }

  // Of piece 0 .. 3: its token less the first, and its place.
  __device__ __forceinline__ int later(int piece) const {
    return in_leaves ? piece % 2 * 2 + piece / 2 * 8 : piece % 2 * 8 + piece / 2 * 4;
  }
  __device__ __forceinline__ int place_of(int piece) const {
    return (place ^ piece / 2 * 4 * 16) + (piece % 2 * 8 + piece / 2 * 4) * 128;
  }

  // The thread's first element of a chunk.
  __device__ __forceinline__ int64_t of_chunk(int chunk) const {
    return offset + static_cast<int64_t>(CHUNK * step) * chunk;
  }
};

// Starts loading a chunk, this head's channels, into a tile; `valid` tokens are in the segment, the
// others become zeros. `source` is the thread's first element.
__device__ __forceinline__ void load_chunk(Tile& tile, const bf16* source, const Pieces& pieces,
                                           int valid) {
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    async_copy_16(tile.at(pieces.place_of(i)), source + pieces.later(i) * pieces.step,
                  pieces.token + pieces.later(i) < valid);
  }
}

// Has the rows that the warp will load of two tensors brought to the level-2 cache, one by each lane.
__device__ __forceinline__ void prefetch_chunk(const bf16* first, const bf16* second,
                                               const Pieces& pieces, int valid) {
  const int column = threadIdx.x % 8, later = pieces.later(column % 4);
  if (pieces.token + later < valid) {
    prefetch_to_level_2((column < 4 ? first : second) + later * pieces.step);
  }
}

// A raw decay of minus infinity, which changes no state, for the tokens beyond the segment. The
// thread's own pieces have been loaded.
__device__ __forceinline__ void clear_decay(Tile& w, const Pieces& pieces, int valid) {
  constexpr unsigned TWO = 0xff80ff80u;
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    if (pieces.token + pieces.later(i) >= valid) {
      *reinterpret_cast<uint4*>(w.at(pieces.place_of(i))) = {TWO, TWO, TWO, TWO};
    }
  }
}

__device__ __forceinline__ void store_chunk(bf16* target, Tile& tile, const Pieces& pieces,
                                            int valid) {
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    if (pieces.token + pieces.later(i) < valid) {
      *reinterpret_cast<uint4*>(target + pieces.later(i) * pieces.step) =
          *reinterpret_cast<uint4*>(tile.at(pieces.place_of(i)));
    }
  }
}

// Tokens of a chunk that belong to the segment.
__device__ __forceinline__ int valid_tokens(const Work& work, int chunk) {
  const int rest = work.length - chunk * CHUNK;
  return rest < CHUNK ? rest : CHUNK;
}

// Blocks that so many tokens fill or begin.
__device__ __forceinline__ int used_blocks(int valid) { return (valid + BLOCK - 1) / BLOCK; }

}  // namespace wkv6

// What the backward of backward.cuh works on: its arguments, its shared memory, and the slices of k,
// of the state and of the state's gradient that a warp owns.
#pragma once

#include "forward.cuh"

namespace wkv6 {

constexpr int BACKWARD_BLOCKS = 3;  // thread blocks for each multiprocessor

struct BackwardArgs {
  Wkv6Problem problem;
  Segments segments;
  const bf16 *r, *k, *v, *w, *dy;
  const float* u;
  const float* dstate_out;  // (n_seq, H, 64, 64); or NULL
  const float* entering;    // (slots, 64, 64): the gradient of the state after each segment
  const uint4* checkpoints;
  bf16 *dr, *dk, *dv, *dw;
  float* du;  // (thread blocks, 64)
  float* dstate_in;
};

struct BackwardShared {
  Tile r, k, v, w, dy;           // r, k, v, w become dr, dk, dv, dw; k is kt meanwhile
  SharedOperand g[SLICES][2];    // G of the current block: key slice, value slice less 2
  SharedOperand scores[BLOCKS];  // A transposed, and dA
  float leaf[BLOCKS][4][4][4];   // dA of leaf, row, column
  float total[BLOCKS][HEAD_SIZE];

  // Where a lane puts its part of fragment (key slice, value slice) of G for the block whose first
  // tile row is `row`: in the key slice's columns of r or w, or in g. Eight neighbouring lanes use
  // different banks.
  __device__ __forceinline__ uint4* g_place(int row, int key_slice, int value_slice,
                                            const Lane& lane) {
    if (value_slice >= 2) return &g[key_slice][value_slice - 2].lanes[lane.lane];
    const int i = lane.lane, tile_row = i / 2 % 4 * 2 + i / 8 % 2 + i / 16 * 8;
    Tile& tile = value_slice == 0 ? r : w;
    return reinterpret_cast<uint4*>(
        tile.at(Tile::moved(Lane::tile_place(tile_row, i % 2), row, 16 * key_slice)));
  }
};

// A lane's slice of k in global memory: two channels of the tokens in tile rows `row` and `row` + 8
// of a block, and the same eight channels further.
struct KeyColumns {
  const bf16* source;  // of the first token of the segment
  int token_step;      // elements
  int token;           // of the block; the other token of the lane is two later

  __device__ KeyColumns(const bf16* k, const Wkv6Problem& problem, const Work& work,
                        const Lane& lane) {
    token = (lane.row & 6) << 1 | (lane.row & 1);
    token_step = static_cast<int>(HEAD_SIZE * problem.H);
    source = k + work.token_offset(problem, token) + 16 * lane.warp + 2 * lane.quad;
  }

  // The channels x tokens of the block that begins at `row` of a chunk with `valid` tokens.
  __device__ __forceinline__ Operand load(int chunk, int row, int valid) const {
    const bf16* const first = source + static_cast<int64_t>(chunk * CHUNK + row) * token_step;
    Operand m;
#pragma unroll
    for (int p = 0; p < 4; p++) {
      const bf16* const pair = first + p % 2 * 2 * token_step + p / 2 * 8;
      const bool inside = row + token + p % 2 * 2 < valid;
      m.pair[p] = inside ? *reinterpret_cast<const uint32_t*>(pair) : 0;
    }
    return m;
  }
};

// Has a checkpoint brought to the level-2 cache: a line of 128 bytes by each of 64 threads.
__device__ __forceinline__ void prefetch_checkpoint(const uint4* checkpoint) {
  constexpr int LINE = 8;
  if (threadIdx.x < CHECKPOINT_PIECES / LINE) prefetch_to_level_2(checkpoint + LINE * threadIdx.x);
}

// The checkpoint before the chunk, advanced to the block whose first tile row is `row`.
__device__ __forceinline__ KeySlice state_before(BackwardShared& shared, const uint4* checkpoint,
                                                 int row, const Lane& lane) {
  KeySlice state;
#pragma unroll
  for (int j = 0; j < SLICES; j++) {
    const uint4 m = checkpoint[(lane.warp * SLICES + j) * 32 + lane.lane];
    const uint32_t pairs[4] = {m.x, m.y, m.z, m.w};
#pragma unroll
    for (int p = 0; p < 4; p++) {
      state.x[j].x[2 * p] = low_half(pairs[p]);
      state.x[j].x[2 * p + 1] = high_half(pairs[p]);
    }
  }
  const int key = 16 * lane.warp;
#pragma unroll 1
  for (int earlier = 0; earlier < row; earlier += BLOCK) {
    const float* const total = shared.total[earlier / BLOCK] + key + lane.row;
    const float total_pair[2] = {total[0], total[8]};
    state.advance(total_pair, shared.k.load_transposed(earlier, key, lane), shared.v, earlier,
                  lane);
  }
  return state;
}

}  // namespace wkv6

// The forward for 64 channels in bf16, on tensor cores. A thread block does one head of one
// segment; warp j owns the value channels 16j .. 16j+15 and keeps its part of the state, transposed
// (16 values x 64 keys), in registers from the first token to the last. Per chunk of 64 tokens:
//
//   1. warp x prepares block x (block.cuh);
//   2. for each block:  y = rt S + A V,   S = diag(total) S + kt^T V.
//
// The chunk is not prefetched: four thread blocks fit a multiprocessor and cover each other's
// loads.
#pragma once

#include "block.cuh"

namespace wkv6 {

constexpr int FORWARD_BLOCKS = 4;  // thread blocks for each multiprocessor

struct ForwardArgs {
  Wkv6Problem problem;
  Segments segments;
  const bf16 *r, *k, *v, *w;
  const float* u;
  const float* state_in;  // (n_seq, H, 64, 64); or NULL
  const float* entering;  // (slots, 64, 64): the state at the start of each segment
  bf16* y;
  float* state_out;
  uint4* checkpoints;
};

// A checkpoint is a bf16 state as the operands of the backward: fragment (key slice, value slice)
// of 16x16, one uint4 for each lane.
constexpr int CHECKPOINT_PIECES = SLICES * SLICES * 32;

__device__ __forceinline__ uint4* checkpoint_fragment(uint4* checkpoint, int key_slice,
                                                      int value_slice) {
  return checkpoint + (key_slice * SLICES + value_slice) * 32;
}

// The state that a segment begins with, or its gradient that a segment ends with: at the edge of a
// sequence its own of `given`, NULL where that is; elsewhere the one of `entering`.
__device__ __forceinline__ const float* boundary_state(const float* given, const float* entering,
                                                       bool at_edge, const Work& work,
                                                       const Wkv6Problem& problem,
                                                       const Segments& segments) {
  const float* const states = at_edge ? given : entering;
  const int64_t index = at_edge ? work.state_index(problem) : blockIdx.x - segments.whole;
  return states == nullptr ? nullptr : states + index * HEAD_SIZE * HEAD_SIZE;
}

// Has the tiles of r, k, w and v of a chunk copied.
template <typename Shared, typename Args>
__device__ __forceinline__ void load_inputs(Shared& shared, const Args& args, const Pieces& pieces,
                                            int64_t offset, int valid) {
  load_chunk(shared.r, args.r + offset, pieces, valid);
  load_chunk(shared.k, args.k + offset, pieces, valid);
  load_chunk(shared.w, args.w + offset, pieces, valid);
  load_chunk(shared.v, args.v + offset, pieces, valid);
}

// Waits for the copies of a chunk that this thread has started; its tail then has no decay.
__device__ __forceinline__ void wait_for_chunk(Tile& w, const Pieces& pieces, int valid) {
  async_commit();
  async_wait<0>();
  if (valid < CHUNK) clear_decay(w, pieces, valid);
}

struct ForwardShared {
  Tile r, k, v, w;  // r and k become rt and kt, v becomes y
  SharedOperand scores[BLOCKS];
  float total[BLOCKS][HEAD_SIZE];
};

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

// y and the new state for the block whose first tile row is `row`; y replaces the warp's columns of
// v.
__device__ __forceinline__ void forward_block(ForwardShared& shared, ValueSlice& state, int row,
                                              const Lane& lane) {
  const int column = 16 * lane.warp;
  const Operand v = shared.v.load_transposed(row, column, lane);  // values x tokens
  Accumulator y;                                                  // tokens x values
  multiply_add(y, shared.scores[row / BLOCK].load(lane), v);
#pragma unroll
  for (int j = 0; j < SLICES; j++) {
    multiply_add(y, shared.r.load(row, 16 * j, lane), as_operand(state.x[j]));
  }
  const float* const total = shared.total[row / BLOCK];
  state.each(lane, [total](float& s, int, int key) { s *= total[key]; });
#pragma unroll
  for (int j = 0; j < SLICES; j++) {
    multiply_add(state.x[j], v, shared.k.load_transposed(row, 16 * j, lane));
  }
  __syncwarp();  // all lanes have read v
  shared.v.store(row, column, as_operand(y), lane);
}

__global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS) forward_kernel(ForwardArgs args) {
  const Wkv6Problem& problem = args.problem;
  const Work work(problem, args.segments, blockIdx.x);
  if (work.length == 0 && !work.last) return;
  ForwardShared& shared = shared_memory<ForwardShared>();
  const Lane lane;

  ValueSlice state;
  const float* const initial =
      boundary_state(args.state_in, args.entering, work.first, work, problem, args.segments);
  if (initial != nullptr) {
    state.each(lane, [=](float& s, int value, int key) { s = initial[key * HEAD_SIZE + value]; });
  }
  const Pieces pieces(problem, work);
  uint4* checkpoint = args.checkpoints;
  if (checkpoint != nullptr) checkpoint += work.checkpoint_index(problem, 0) * CHECKPOINT_PIECES;
  for (int chunk = 0; chunk < work.chunks(); chunk++) {
    const int valid = valid_tokens(work, chunk), blocks = used_blocks(valid);
    const int64_t offset = pieces.of_chunk(chunk);
    // No barrier before the loads: a thread overwrites what it has just stored itself (y), and
    // tiles that were last read before the barrier above.
    load_inputs(shared, args, pieces, offset, valid);
    wait_for_chunk(shared.w, pieces, valid);
    __syncthreads();
    if (lane.warp < blocks) {
      const int row = lane.warp * BLOCK;
      const Operand scores =
          prepare_block(shared.r, shared.k, shared.w, &shared.r, shared.k, shared.total[lane.warp],
                        args.u + work.head * HEAD_SIZE, row, lane);
      shared.scores[lane.warp].store(scores, lane);
    }
    if (checkpoint != nullptr) {
#pragma unroll
      for (int j = 0; j < SLICES; j++) {
        const Operand s = transposed(as_operand(state.x[j]));
        checkpoint_fragment(checkpoint, j, lane.warp)[lane.lane] = {s.pair[0], s.pair[1], s.pair[2],
                                                                    s.pair[3]};
      }
      checkpoint += problem.H * CHECKPOINT_PIECES;
    }
    __syncthreads();
#pragma unroll 1
    for (int block = 0; block < blocks; block++) {
      forward_block(shared, state, block * BLOCK, lane);
    }
    __syncthreads();
    store_chunk(args.y + offset, shared.v, pieces, valid);
  }
  if (args.state_out != nullptr && work.last) {
    float* const final_state = args.state_out + work.state_index(problem) * HEAD_SIZE * HEAD_SIZE;
    state.each(lane,
               [=](float& s, int value, int key) { final_state[key * HEAD_SIZE + value] = s; });
  }
}

}  // namespace wkv6

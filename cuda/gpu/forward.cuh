// The forward for 64 channels in bf16, on tensor cores. A thread block does one head of one
// segment; warp j owns the value channels 16j .. 16j+15 and keeps its part of the state, transposed
// (16 values x 64 keys), in registers from the first token to the last. Per chunk of 64 tokens:
//
//   1. warp x prepares block x (block.cuh);
//   2. for each block:  y = rt S + A V,   S = diag(total) S + kt^T V.
//
// The next chunk is loaded meanwhile: w as soon as its block is prepared, r and k into the level-2
// cache during step 2 and from there when it is done; v, needed only in step 2, during step 1.
#pragma once

#include "block.cuh"
#include "slices.cuh"

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

// Waits until at most PENDING groups of copies of this thread are under way, those of its block of w
// not among them; tokens beyond the segment then have no decay there.
template <int PENDING>
__device__ __forceinline__ void wait_for_block(Tile& w, const Pieces& pieces, int valid) {
  async_wait<PENDING>();
  if (valid < CHUNK) clear_decay(w, pieces, valid);
  __syncwarp();
}

struct ForwardShared {
  Tile r, k, v, w;  // r and k become rt and kt, v becomes y
  SharedOperand scores[BLOCKS];
  float total[BLOCKS][HEAD_SIZE];
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
    multiply_add(state.x[j], v, shared.k.load_transposed_right(row, 16 * j, lane));
  }
  __syncwarp();  // all lanes have read v
  shared.v.store(row, column, as_operand(y), lane);
}

__device__ __forceinline__ void load_keys(ForwardShared& shared, const ForwardArgs& args,
                                          const Pieces& pieces, int64_t offset, int valid) {
  load_chunk(shared.r, args.r + offset, pieces, valid);
  load_chunk(shared.k, args.k + offset, pieces, valid);
}

__device__ __forceinline__ void prepare_own_block(ForwardShared& shared, const float* u,
                                                  const Lane& lane) {
  const Operand scores = prepare_block(shared.r, shared.k, shared.w, &shared.r, shared.k,
                                       shared.total[lane.warp], u, lane.warp * BLOCK, lane);
  shared.scores[lane.warp].store(scores, lane);
}

// The state before a chunk, for the backward.
__device__ __forceinline__ void store_checkpoint(uint4* checkpoint, const ValueSlice& state,
                                                 const Lane& lane) {
#pragma unroll
  for (int j = 0; j < SLICES; j++) {
    const Operand s = transposed(as_operand(state.x[j]));
    checkpoint_fragment(checkpoint, j, lane.warp)[lane.lane] = {s.pair[0], s.pair[1], s.pair[2],
                                                                s.pair[3]};
  }
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
  int valid = valid_tokens(work, 0);
  if (valid > 0) {
    load_chunk(shared.w, args.w + pieces.offset, pieces, valid);
    load_keys(shared, args, pieces, pieces.offset, valid);
  }
  async_commit();
  if (valid > 0) load_chunk(shared.v, args.v + pieces.offset, pieces, valid);
  async_commit();
  uint4* checkpoint = args.checkpoints;
  if (checkpoint != nullptr) checkpoint += work.checkpoint_index(problem, 0) * CHECKPOINT_PIECES;
  for (int chunk = 0; chunk < work.chunks(); chunk++) {
    const int next_valid = valid_tokens(work, chunk + 1), blocks = used_blocks(valid);
    const int64_t offset = pieces.of_chunk(chunk), next = pieces.of_chunk(chunk + 1);
    if (checkpoint != nullptr) {
      store_checkpoint(checkpoint, state, lane);
      checkpoint += problem.H * CHECKPOINT_PIECES;
    }
    wait_for_block<1>(shared.w, pieces, valid);  // but not for v
    if (lane.warp < blocks) prepare_own_block(shared, args.u + work.head * HEAD_SIZE, lane);
    // The lanes met in prepare_block after they had read the last of w.
    if (next_valid > 0) load_chunk(shared.w, args.w + next, pieces, next_valid);
    async_commit();
    async_wait<1>();  // but not for the next w
    __syncthreads();
    if (next_valid > 0) prefetch_chunk(args.r + next, args.k + next, pieces, next_valid);
#pragma unroll 1
    for (int block = 0; block < blocks; block++) {
      forward_block(shared, state, block * BLOCK, lane);
    }
    __syncthreads();
    if (next_valid > 0) load_keys(shared, args, pieces, next, next_valid);
    async_commit();
    store_chunk(args.y + offset, shared.v, pieces, valid);
    if (next_valid > 0) load_chunk(shared.v, args.v + next, pieces, next_valid);
    async_commit();
    valid = next_valid;
  }
  if (args.state_out != nullptr && work.last) {
    float* const final_state = args.state_out + work.state_index(problem) * HEAD_SIZE * HEAD_SIZE;
    state.each(lane,
               [=](float& s, int value, int key) { final_state[key * HEAD_SIZE + value] = s; });
  }
}

}  // namespace wkv6

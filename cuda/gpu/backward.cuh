// The backward for 64 channels in bf16, on tensor cores. A thread block does one head of one
// segment, from its last chunk to its first; warp j owns the key channels 16j .. 16j+15 and keeps
// its part of G, the gradient of the state (16 keys x 64 values), in registers throughout. Per
// chunk of 64 tokens:
//
//   1. warp x prepares block x: scores A, kt in place of k, and dA = dY V^T, the leaves in fp32;
//   2. for each block, last first, with S the state before it, from the checkpoint:
//        per key slice:   dr = from_start * (dY S^T) + pairs,   dk = to_end * (V G^T) + pairs,
//                         dw, du, and G = diag(total) G + rt^T dY;
//        per value slice: dv = A^T dY + kt G.
//
// Shared memory is what limits the thread blocks of a multiprocessor, so little is in it that could
// be elsewhere: a warp reads its slice of k once more from global memory, G passes from the key to
// the value slices partly through the columns of r and w that its warp has read, and dr, dk, dw wait
// in registers until then. A and dA share a fragment: one has pairs of leaves (row <= column), the
// other (row > column).
#pragma once

#include "backward_state.cuh"
#include "block_gradients.cuh"

namespace wkv6 {

constexpr float STRONGEST = 4e34f;  // of -log decay as a factor

// dA of the block, beside its scores.
__device__ __forceinline__ void prepare_score_gradients(BackwardShared& shared,
                                                        const Operand& scores, int row,
                                                        const Lane& lane) {
  Accumulator product;
#pragma unroll
  for (int v = 0; v < HEAD_SIZE; v += 16) {
    multiply_add(product, shared.dy.load(row, v, lane), shared.v.load_right(row, v, lane));
  }
  const Leaf da = as_leaf(product);
  const PairPlace place(lane);
  const int block = row / BLOCK;
  shared.scores[block].store(chosen(place.below, as_operand(da), transposed(scores)), lane);
  if (place.leaf) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      shared.leaf[block][lane.quad][2 * (i / 4) + place.odd][i % 4] = da.x[i / 4][i % 4];
    }
  }
}

// dr, dk, dw of a block for the warp's key channels, tokens x channels.
struct KeySliceGradients {
  Operand dr, dk, dw;

  __device__ __forceinline__ void store(BackwardShared& shared, int row, const Lane& lane) const {
    const int key = 16 * lane.warp;
    shared.r.store(row, key, dr, lane);
    shared.k.store(row, key, dk, lane);
    shared.w.store(row, key, dw, lane);
  }
};

// The key slice of the block: its gradients; G, published in shared memory and then taken to the
// block's start; du. `k`: tokens x channels.
__device__ __forceinline__ KeySliceGradients key_slice_gradients(BackwardShared& shared,
                                                                 KeySlice& state, KeySlice& g,
                                                                 float (&du)[2], const Operand& k,
                                                                 const float* u, int row,
                                                                 const Lane& lane) {
  const int key = 16 * lane.warp, block = row / BLOCK;
  BlockInputs in;
  in.r = as_leaf(shared.r.load_transposed(row, key, lane));
  in.k = as_leaf(transposed(k));
  in.log_decay = log_decay(as_leaf(shared.w.load_transposed(row, key, lane)));
  in.decay = decay(in.log_decay);
  const DecayProducts products(in.decay, lane);

  Accumulator state_r, state_k, level4, level8;
  in.state_gradient[0] = in.state_gradient[1] = 0.0f;
  __syncwarp();  // all lanes have read r and w
#pragma unroll
  for (int j = 0; j < SLICES; j++) {
    const Operand g_operand = as_operand(g.x[j]), published = transposed(g_operand);
    *shared.g_place(row, lane.warp, j, lane) = {published.pair[0], published.pair[2],
                                                published.pair[1], published.pair[3]};
    multiply_add(state_r, as_operand(state.x[j]), shared.dy.load_right(row, 16 * j, lane));
    multiply_add(state_k, g_operand, shared.v.load_right(row, 16 * j, lane));
#pragma unroll
    for (int i = 0; i < 8; i++) in.state_gradient[i / 2 % 2] += state.x[j].x[i] * g.x[j].x[i];
  }
  const TreeOperands tree(in.r, in.k, products, TreeRows(lane));
  const LevelGradients levels(shared.scores[block].load(lane), lane);
  multiply_add(level4, tree.level4, levels.level4);
  multiply_add(level8, tree.level8, levels.level8);
  in.state_r = as_leaf(state_r);
  in.state_k = as_leaf(state_k);
  in.level4 = as_leaf(level4);
  in.level8 = as_leaf(level8);

  BlockGradients out;
  Leaf r_decayed;
#pragma unroll
  for (int c = 0; c < 2; c++) {
    in.state_gradient[c] = quad_sum(in.state_gradient[c]);
    state_and_tree_gradients(out, in, products, c, lane);
    du[c] += leaf_gradients(out, in, shared.leaf[block][lane.quad], u[key + lane.row + 8 * c], c);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // Finite, so that a gradient of zero stays one where the decay is infinitely strong.
      out.dw.x[c][i] *= fmaxf(in.log_decay.x[c][i], -STRONGEST);
      r_decayed.x[c][i] = in.r.x[c][i] * products.from_start(c, i);
    }
  }
  g.advance(products.total, as_operand(r_decayed), shared.dy, row, lane);
  return {transposed(as_operand(out.dr)), transposed(as_operand(out.dk)),
          transposed(as_operand(out.dw))};
}

// dv of the block for the warp's value channels, in place of v.
__device__ __forceinline__ void value_slice_gradients(BackwardShared& shared, int row,
                                                      const Lane& lane) {
  const int value = 16 * lane.warp;
  Accumulator dv;  // tokens x values
  const Operand scores =
      chosen(PairPlace(lane).below, Operand{}, shared.scores[row / BLOCK].load(lane));
  multiply_add(dv, scores, shared.dy.load_transposed_right(row, value, lane));
#pragma unroll
  for (int n = 0; n < SLICES; n++) {
    const uint4 g = *shared.g_place(row, n, lane.warp, lane);
    multiply_add(dv, shared.k.load(row, 16 * n, lane), RightOperand{g.x, g.y, g.z, g.w});
  }
  shared.v.store(row, value, as_operand(dv), lane);
}

__device__ __forceinline__ void load_backward_chunk(BackwardShared& shared,
                                                    const BackwardArgs& args, const Pieces& pieces,
                                                    int64_t offset, int valid) {
  load_chunk(shared.w, args.w + offset, pieces, valid);
  load_chunk(shared.r, args.r + offset, pieces, valid);
  load_chunk(shared.k, args.k + offset, pieces, valid);
  load_chunk(shared.v, args.v + offset, pieces, valid);
  load_chunk(shared.dy, args.dy + offset, pieces, valid);
  async_commit();
}

// Has the inputs of a whole chunk brought to the level-2 cache.
__device__ __forceinline__ void prefetch_inputs(const BackwardArgs& args, const Pieces& pieces,
                                                int64_t offset) {
  prefetch_chunk(args.w + offset, args.r + offset, pieces, CHUNK);
  prefetch_chunk(args.k + offset, args.v + offset, pieces, CHUNK);
  prefetch_chunk(args.dy + offset, args.dy + offset, pieces, CHUNK);
}

__device__ __forceinline__ void store_backward_chunk(BackwardShared& shared,
                                                     const BackwardArgs& args, const Pieces& pieces,
                                                     int64_t offset, int valid) {
  store_chunk(args.dr + offset, shared.r, pieces, valid);
  store_chunk(args.dk + offset, shared.k, pieces, valid);
  store_chunk(args.dw + offset, shared.w, pieces, valid);
  store_chunk(args.dv + offset, shared.v, pieces, valid);
}

__global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS) backward_kernel(BackwardArgs args) {
  const Wkv6Problem& problem = args.problem;
  const Work work(problem, args.segments, blockIdx.x);
  BackwardShared& shared = shared_memory<BackwardShared>();
  const Lane lane;
  const float* const u = args.u + work.head * HEAD_SIZE;

  KeySlice g;
  float du[2] = {};
  const float* const final_gradient =
      boundary_state(args.dstate_out, args.entering, work.last, work, problem, args.segments);
  if (final_gradient != nullptr && (work.length > 0 || work.last)) {
    g.each(lane,
           [=](float& x, int key, int value) { x = final_gradient[key * HEAD_SIZE + value]; });
  }
  const int64_t checkpoint_step = problem.H * CHECKPOINT_PIECES;
  const uint4* checkpoint =
      args.checkpoints + work.checkpoint_index(problem, work.chunks()) * CHECKPOINT_PIECES;
  const Pieces pieces(problem, work);
  const KeyColumns k_columns(args.k, problem, work, lane);
  int chunk = work.chunks() - 1, valid = valid_tokens(work, chunk);
  if (chunk >= 0) load_backward_chunk(shared, args, pieces, pieces.of_chunk(chunk), valid);
  for (; chunk >= 0; chunk--) {
    const int blocks = used_blocks(valid);
    checkpoint -= checkpoint_step;
    prefetch_checkpoint(checkpoint);
    wait_for_block<0>(shared.w, pieces, valid);
    if (lane.warp < blocks) {
      const int row = lane.warp * BLOCK;
      const Operand scores = prepare_block(shared.r, shared.k, shared.w, nullptr, shared.k,
                                           shared.total[lane.warp], u, row, lane);
      prepare_score_gradients(shared, scores, row, lane);
    }
    __syncthreads();
#pragma unroll 1
    for (int row = (blocks - 1) * BLOCK; row >= 0; row -= BLOCK) {
      const Operand k = k_columns.load(chunk, row, valid);
      KeySlice state = state_before(shared, checkpoint, row, lane);
      const KeySliceGradients gradients =
          key_slice_gradients(shared, state, g, du, k, u, row, lane);
      if (row == 0 && chunk > 0) prefetch_inputs(args, pieces, pieces.of_chunk(chunk - 1));
      __syncthreads();  // G is complete, and no warp needs v of this block any more
      value_slice_gradients(shared, row, lane);
      __syncthreads();  // all warps are done with G and kt
      gradients.store(shared, row, lane);
    }
    __syncthreads();
    // No barrier before the loads: a thread overwrites what it has just stored itself, and dy, last
    // read before the barrier above.
    store_backward_chunk(shared, args, pieces, pieces.of_chunk(chunk), valid);
    if (chunk > 0) {
      load_backward_chunk(shared, args, pieces, pieces.of_chunk(chunk - 1), CHUNK);
    }
    valid = CHUNK;
  }

  float* const du_slot =
      args.du + static_cast<int64_t>(blockIdx.x) * HEAD_SIZE + 16 * lane.warp + lane.row;
#pragma unroll
  for (int c = 0; c < 2; c++) {
    du[c] = quad_sum(du[c]);
    if (lane.quad == 0) du_slot[8 * c] = du[c];
  }
  if (args.dstate_in != nullptr && work.first) {
    float* const initial_gradient =
        args.dstate_in + work.state_index(problem) * HEAD_SIZE * HEAD_SIZE;
    g.each(lane,
           [=](float& x, int key, int value) { initial_gradient[key * HEAD_SIZE + value] = x; });
  }
}

}  // namespace wkv6

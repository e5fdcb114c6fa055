// The backward of WKV7 for 64 channels in bf16, on tensor cores. A thread block does one head of one
// sequence, from its last chunk of 64 tokens to its first; warp j keeps the value channels 16j ..
// 16j+15 of G, the gradient of the state (16 values x 64 keys, fp32), in registers throughout. With
// the names of wkv7_block.cuh and G the gradient of the state after a block, times diag(P_15), z the
// gradient of AK V + at S^T:
//
//   z  = (I - AB)^-T (RB^T dY + bt G^T)        dV = RK^T dY + AK^T z + kt G^T
//   dat = zu bt + zv kt + z S                  dbt = zu^T at + yu^T rt + u G
//   drt = yu bt + yv kt + dY S                 dkt = zv^T at + yv^T rt + V G
//   G <- G + dY^T rt + z^T at
//
// where zu = z u^T and zv = z V^T below the diagonal, yu = dY u^T and yv = dY V^T with it. As in the
// forward, the inverse is applied by substitution in fp32 to what does not depend on G. Where tokens
// read and write the same key again and again, u and z are small beside S and G, which grow elsewhere:
// factors that they depend on are taken as two bf16 each. Per chunk:
//
//   1. warp x prepares block x: W and TK, (I - AB)^-T bt and RB (I - AB)^-1, AK, RK;
//   2. u of every block, the states made once more from the checkpoint before the chunk;
//   3. for each block, last first: per value slice z, dV and the new G; per pair of tokens zu, zv,
//      yu, yv; per key slice the other gradients (wkv7_gradients.cuh).
//
// For every chunk it reads 56 KB of inputs and dy and a state of 16 KB, and writes 48 KB. A state for
// each block instead of each chunk would spare the second step for 48 KB more, and as much again in
// the forward.
#pragma once

#include "wkv7_gradients.cuh"

namespace wkv7 {

constexpr int CHUNK_BACKWARD_BLOCKS = 2;  // thread blocks for each multiprocessor

struct ChunkBackwardArgs {
  Wkv6Problem problem;
  RowPointers rows;
  const bf16* dy;
  const float *dstate_out, *checkpoints;  // dstate_out: or NULL
  bf16 *dr, *dk, *dv, *dw, *da, *db;
  float* dstate_in;  // or NULL
};

// What each slot of a block's matrices holds before the pairs.
enum Prepared { TK, RT_TRANSPOSED, AK_TRANSPOSED, RK_TRANSPOSED };

// What a warp prepares of its block.
__device__ __forceinline__ void prepare_backward(ChunkBackwardShared& shared, const RawDecays& w,
                                                 const Lane& lane) {
  RowTiles& rows = shared.rows;
  const int block = lane.warp, row = BLOCK * block, column = lane.lane % BLOCK;
  SharedOperand* const prepared = shared.matrices[block];
  Matrix* const ab = reinterpret_cast<Matrix*>(shared.u.at(row * 128));
  Matrix* const rb = ab + 1;
  Matrix* const ak = reinterpret_cast<Matrix*>(shared.solved_a.at(row * 128));
  Columns a, b;
  scale_rows(rows, w, shared.total[block], a, b, row, lane);
  a.store_rest(shared.solved_a, rows.a, row, lane);
  b.store_rest(shared.solved_b, rows.b, row, lane);
  __syncwarp();
  Scores of_a, of_r;
  of_a.add(rows.a, rows.b, rows.k, row, lane);
  of_a.add(shared.solved_a, rows.b, rows.k, row, lane);
  of_a.mask(false, lane);
  of_r.add(rows.r, rows.b, rows.k, row, lane);
#pragma unroll
  for (int n = 0; n < HEAD_SIZE; n += 16) {
    multiply_add(of_r.b, rows.r.load(row, n, lane), shared.solved_b.load_right(row, n, lane));
  }
  of_r.mask(true, lane);
  __syncwarp();  // all lanes have read the rest of at
  ab->store(of_a.b, lane);
  ak->store(of_a.k, lane);
  rb->store(of_r.b, lane);
  prepared[AK_TRANSPOSED].store(transposed(as_operand(of_a.k)), lane);
  prepared[RK_TRANSPOSED].store(transposed(as_operand(of_r.k)), lane);
  __syncwarp();
#pragma unroll
  for (int t = 0; t < BLOCK; t++) {
    a.x[t][2] = ak->x[t][column];
    b.x[t][2] = rb->x[column][t];
  }
  solve(*ab, a);
  solve_transposed(*ab, b);
  __syncwarp();  // all lanes have read AK
  a.store(shared.solved_a, row, lane);
  a.store_matrix(prepared[TK], lane);
  b.store(shared.solved_b, row, lane);
  b.store_rest(shared.rest_b, shared.solved_b, row, lane);
  b.store_matrix(prepared[RT_TRANSPOSED], lane);
}

// u of every block of the chunk, for the warp's value channels.
__device__ __forceinline__ void find_u(ChunkBackwardShared& shared, const float* checkpoint,
                                       int blocks, const Lane& lane) {
  RowTiles& rows = shared.rows;
  const int value = 16 * lane.warp;
  wkv6::ValueSlice state;
  load_state(state, checkpoint, lane);
#pragma unroll 1
  for (int block = 0; block < blocks; block++) {
    const int row = BLOCK * block;
    const Operand v = rows.v.load_transposed(row, value, lane);
    const Operand u = as_operand(
        read_by_a<true>(state, v, shared.matrices[block][TK], shared.solved_a, row, lane));
    shared.u.store(row, value, u, lane);
    if (block + 1 == blocks) break;
    advance(state, transposed(u), v, rows, shared.total[block], row, lane);
  }
}

// z and dV of a block for the warp's value channels, tokens x values; G is published, then taken to
// the block's start.
struct ValueGradients {
  Operand z, dv;

  __device__ __forceinline__ ValueGradients(ChunkBackwardShared& shared, wkv6::ValueSlice& g,
                                            int row, const Lane& lane) {
    RowTiles& rows = shared.rows;
    const int value = 16 * lane.warp;
    const SharedOperand* const prepared = shared.matrices[row / BLOCK];
    const float* const total = shared.total[row / BLOCK];
    g.each(lane, [total](float& x, int, int key) { x *= total[key]; });
    const Operand dy = shared.dy.load_transposed(row, value, lane);  // values x tokens
    Accumulator z_sum, dv_sum;
    multiply_add(z_sum, prepared[RT_TRANSPOSED].load(lane), dy);
    multiply_add(dv_sum, prepared[RK_TRANSPOSED].load(lane), dy);
#pragma unroll
    for (int j = 0; j < SLICES; j++) {
      const Operand g_operand = as_operand(g.x[j]);
      shared.solved_a.store(value, 16 * j, g_operand, lane);
      const Operand reader = shared.solved_b.load(row, 16 * j, lane);
      multiply_add(z_sum, reader, g_operand);
      multiply_add(z_sum, reader, rest_of(g.x[j], g_operand));
      multiply_add(z_sum, shared.rest_b.load(row, 16 * j, lane), g_operand);
      multiply_add(dv_sum, rows.k.load(row, 16 * j, lane), g_operand);
    }
    z = as_operand(z_sum);
    const Operand z_transposed = transposed(z);
    multiply_add(dv_sum, prepared[AK_TRANSPOSED].load(lane), z_transposed);
    dv = as_operand(dv_sum);
#pragma unroll
    for (int j = 0; j < SLICES; j++) {
      multiply_add(g.x[j], dy, rows.r.load_transposed_right(row, 16 * j, lane));
      multiply_add(g.x[j], z_transposed, rows.a.load_transposed_right(row, 16 * j, lane));
    }
  }
};

// The pairs of tokens, one of the four matrices for each warp.
__device__ __forceinline__ void find_pairs(ChunkBackwardShared& shared, int row, const Lane& lane) {
  Tile& read = lane.warp == ZU || lane.warp == ZV ? shared.solved_b : shared.dy;
  Tile& written = lane.warp == ZU || lane.warp == YU ? shared.u : shared.rows.v;
  Accumulator pairs;
#pragma unroll
  for (int v = 0; v < HEAD_SIZE; v += 16) {
    multiply_add(pairs, read.load(row, v, lane), written.load_right(row, v, lane));
  }
  const bool with_diagonal = lane.warp == YU || lane.warp == YV;
  shared.matrices[row / BLOCK][lane.warp].store(as_operand(lower(pairs, with_diagonal, lane)),
                                                lane);
}

__device__ __forceinline__ void store_gradients(ChunkBackwardShared& shared,
                                                const ChunkBackwardArgs& args, const Pieces& pieces,
                                                int64_t offset, int valid) {
  store_chunk(args.dr + offset, shared.rows.r, pieces, valid);
  store_chunk(args.dk + offset, shared.rows.k, pieces, valid);
  store_chunk(args.dv + offset, shared.rows.v, pieces, valid);
  store_chunk(args.dw + offset, shared.u, pieces, valid);
  store_chunk(args.da + offset, shared.rows.a, pieces, valid);
  store_chunk(args.db + offset, shared.rows.b, pieces, valid);
}

__global__ void __launch_bounds__(wkv6::THREADS, CHUNK_BACKWARD_BLOCKS)
    chunk_backward_kernel(ChunkBackwardArgs args) {
  const Wkv6Problem& problem = args.problem;
  const Work work(problem, wkv6::uncut_segments(problem), blockIdx.x);
  ChunkBackwardShared& shared = finchtune::shared_memory<ChunkBackwardShared>();
  const Lane lane;
  const int64_t matrix = HEAD_SIZE * HEAD_SIZE, own = work.state_index(problem) * matrix;
  const int step = static_cast<int>(problem.H * HEAD_SIZE);

  wkv6::ValueSlice g;
  if (args.dstate_out != nullptr) load_state(g, args.dstate_out + own, lane);
  const Pieces pieces(problem, work, false);
  const bf16* const w = args.rows.w + work.token_offset(problem, 0);
  for (int chunk = work.chunks() - 1; chunk >= 0; chunk--) {
    const int valid = valid_tokens(work, chunk), blocks = wkv6::used_blocks(valid);
    const int64_t offset = pieces.of_chunk(chunk);
    const float* const checkpoint =
        args.checkpoints + work.checkpoint_index(problem, chunk) * matrix;
    // No barrier before the loads: a thread overwrites what it has just stored itself, and dy,
    // last read before the barrier above.
    shared.rows.load(args.rows, offset, pieces, valid);
    load_chunk(shared.dy, args.dy + offset, pieces, valid);
    wkv6::async_commit();
    const RawDecays decays(w, chunk, valid, problem, lane);
    wkv6::prefetch_to_level_2(checkpoint + 32 * threadIdx.x);  // a line of 128 bytes each
    wkv6::async_wait<0>();
    __syncwarp();  // a warp loads the rows of the block that it prepares
    if (lane.warp < blocks) prepare_backward(shared, decays, lane);
    __syncthreads();
    find_u(shared, checkpoint, blocks, lane);
    __syncthreads();
    if (chunk > 0) {
      const int64_t next = pieces.of_chunk(chunk - 1);
      args.rows.prefetch(next, pieces, CHUNK);
      prefetch_chunk(args.dy + next, args.dy + next, pieces, CHUNK);
    }
#pragma unroll 1
    for (int row = (blocks - 1) * BLOCK; row >= 0; row -= BLOCK) {
      const bf16* const w_of_block = w + static_cast<int64_t>(chunk * CHUNK + row) * step;
      const DecayLeaf decay(w_of_block + 2 * lane.quad * step + 16 * lane.warp + lane.row, step,
                            row, valid, lane);
      const KeySlice state = state_before(shared, checkpoint, row, lane);
      const ValueGradients of_values(shared, g, row, lane);
      __syncthreads();  // G is complete; no warp needs the solution for bt any more
      shared.solved_b.store(row, 16 * lane.warp, of_values.z, lane);
      KeyGradients of_keys(shared.rows, row, lane);
      of_keys.add_gradient(shared, state, row, lane);
      __syncthreads();  // z is complete
      find_pairs(shared, row, lane);
      of_keys.add_state(shared, state, row, lane);
      __syncthreads();  // the pairs are complete; only a warp's own columns are read from here on
      of_keys.add_pairs(shared.matrices[row / BLOCK], lane);
      of_keys.store(shared, decay, row, lane);
      shared.rows.v.store(row, 16 * lane.warp, of_values.dv, lane);
    }
    __syncthreads();
    store_gradients(shared, args, pieces, offset, valid);
  }
  if (args.dstate_in != nullptr) store_state(g, args.dstate_in + own, lane);
}

}  // namespace wkv7

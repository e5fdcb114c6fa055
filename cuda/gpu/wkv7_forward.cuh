// The forward of WKV7 for 64 channels in bf16, on tensor cores (wkv7_block.cuh). A thread block does
// one head of one sequence; warp j owns the value channels 16j .. 16j+15 and keeps its part of the
// state (16 values x 64 keys, fp32) in registers from the first token to the last. Per chunk of 64
// tokens:
//
//   1. warp x prepares block x: rt + RB W in place of r, W of a, kt of k, bt of b;
//   2. for each block:  u = TK V + W S^T,   y = (rt + RB W) S^T + (RK + RB TK) V,   the new S.
//
// For every chunk it reads 48 KB of inputs and writes 8 KB of y and, for a backward, the state before
// the chunk, 16 KB: as the scan does, so that either kernel can do the backward.
#pragma once

#include "wkv7_block.cuh"

namespace wkv7 {

constexpr int CHUNK_FORWARD_BLOCKS = 4;  // thread blocks for each multiprocessor

struct ChunkForwardArgs {
  Wkv6Problem problem;
  RowPointers rows;
  const float* state_in;  // (n_seq, H, 64 values, 64 keys); or NULL
  bf16* y;
  float *state_out, *checkpoints;  // or NULL
};

struct ChunkForwardShared {
  RowTiles rows;  // v becomes y
  SharedOperand tk[BLOCKS], yv[BLOCKS];
  float total[BLOCKS][HEAD_SIZE];
};

// What a warp prepares of its block.
__device__ __forceinline__ void prepare_forward(ChunkForwardShared& shared, const RawDecays& w,
                                                const Lane& lane) {
  RowTiles& rows = shared.rows;
  const int block = lane.warp, row = BLOCK * block;
  Columns a, b;
  scale_rows(rows, w, shared.total[block], a, b, row, lane);
  __syncwarp();
  Scores of_a, of_r;
  of_a.add(rows.a, rows.b, rows.k, row, lane);
  of_a.mask(false, lane);
  __syncwarp();  // all lanes have read at; its rows hold AB and AK until W takes them
  Matrix* const matrices = reinterpret_cast<Matrix*>(rows.a.at(row * 128));
  matrices[0].store(of_a.b, lane);
  matrices[1].store(of_a.k, lane);
  __syncwarp();
#pragma unroll
  for (int t = 0; t < BLOCK; t++) a.x[t][2] = matrices[1].x[t][lane.lane % BLOCK];
  solve(matrices[0], a);
  __syncwarp();  // all lanes have read the matrices
  a.store(rows.a, row, lane);
  a.store_matrix(shared.tk[block], lane);
  __syncwarp();

  of_r.add(rows.r, rows.b, rows.k, row, lane);
  of_r.mask(true, lane);
  const Operand rb = as_operand(of_r.b);
  Accumulator yv = of_r.k;
  multiply_add(yv, rb, transposed(shared.tk[block].load(lane)));
  shared.yv[block].store(as_operand(yv), lane);
#pragma unroll
  for (int n = 0; n < HEAD_SIZE; n += 16) {
    const Operand rt = rows.r.load(row, n, lane);
    Accumulator sum;
#pragma unroll
    for (int p = 0; p < 4; p++) {
      sum.x[2 * p] = low_half(rt.pair[p]);
      sum.x[2 * p + 1] = high_half(rt.pair[p]);
    }
    multiply_add(sum, rb, rows.a.load_transposed_right(row, n, lane));
    // A lane overwrites the elements of rt that it has loaded, after a product of all lanes.
    rows.r.store(row, n, as_operand(sum), lane);
  }
}

// y and the new state for the block whose first tile row is `row`; y replaces the warp's columns of
// v.
__device__ __forceinline__ void forward_block(ChunkForwardShared& shared, wkv6::ValueSlice& state,
                                              int row, const Lane& lane) {
  RowTiles& rows = shared.rows;
  const int block = row / BLOCK, column = 16 * lane.warp;
  const Operand v = rows.v.load_transposed(row, column, lane);  // values x tokens
  Accumulator y;                                                // tokens x values
  multiply_add(y, shared.yv[block].load(lane), v);
#pragma unroll
  for (int j = 0; j < SLICES; j++) {
    multiply_add(y, rows.r.load(row, 16 * j, lane), as_operand(state.x[j]));
  }
  const Accumulator u = read_by_a<false>(state, v, shared.tk[block], rows.a, row, lane);
  advance(state, transposed(as_operand(u)), v, rows, shared.total[block], row, lane);
  __syncwarp();  // all lanes have read v
  rows.v.store(row, column, as_operand(y), lane);
}

__global__ void __launch_bounds__(wkv6::THREADS, CHUNK_FORWARD_BLOCKS)
    chunk_forward_kernel(ChunkForwardArgs args) {
  const Wkv6Problem& problem = args.problem;
  const Work work(problem, wkv6::uncut_segments(problem), blockIdx.x);
  ChunkForwardShared& shared = finchtune::shared_memory<ChunkForwardShared>();
  const Lane lane;
  const int64_t matrix = HEAD_SIZE * HEAD_SIZE, own = work.state_index(problem) * matrix;

  wkv6::ValueSlice state;
  if (args.state_in != nullptr) load_state(state, args.state_in + own, lane);
  const Pieces pieces(problem, work, false);
  const bf16* const w = args.rows.w + work.token_offset(problem, 0);
  for (int chunk = 0; chunk < work.chunks(); chunk++) {
    const int valid = valid_tokens(work, chunk), blocks = wkv6::used_blocks(valid);
    const int64_t offset = pieces.of_chunk(chunk);
    // No barrier before the loads: a thread overwrites what it has just stored itself (y), and
    // tiles that were last read before the barrier above.
    shared.rows.load(args.rows, offset, pieces, valid);
    wkv6::async_commit();
    const RawDecays decays(w, chunk, valid, problem, lane);
    if (args.checkpoints != nullptr)
      store_state(state, args.checkpoints + work.checkpoint_index(problem, chunk) * matrix, lane);
    wkv6::async_wait<0>();
    __syncwarp();  // a warp loads the rows of the block that it prepares
    if (lane.warp < blocks) prepare_forward(shared, decays, lane);
    __syncthreads();
    args.rows.prefetch(pieces.of_chunk(chunk + 1), pieces, valid_tokens(work, chunk + 1));
#pragma unroll 1
    for (int block = 0; block < blocks; block++) forward_block(shared, state, block * BLOCK, lane);
    __syncthreads();
    store_chunk(args.y + offset, shared.rows.v, pieces, valid);
  }
  if (args.state_out != nullptr) store_state(state, args.state_out + own, lane);
}

}  // namespace wkv7

// The gradients of a block of WKV7 for the 16 key channels of a warp: what lies in memory for the
// backward (wkv7_backward.cuh), and the part of it that follows from z. Fragments are channels x
// tokens: a lane has two channels and, in order, the tokens 2q, 2q+1, 8+2q, 8+2q+1.
#pragma once

#include "block_gradients.cuh"
#include "wkv7_block.cuh"

namespace wkv7 {

using wkv6::as_leaf;
using wkv6::KeySlice;
using wkv6::Leaf;

enum Pair { ZU, ZV, YU, YV, PAIRS };  // z u^T, z v^T, dy u^T, dy v^T: tokens x tokens

struct ChunkBackwardShared {
  RowTiles rows;  // become dr, dk, dv, da, db
  Tile dy;
  Tile solved_a;  // AK of the blocks, then W, then G as values x keys
  Tile solved_b;  // the transposed solution for bt, then z
  Tile rest_b;    // what rounding took from that solution
  Tile u;         // AB and RB of the blocks, then u, then dw
  // TK and the transposes of RB (I - AB)^-1, AK and RK; then the pairs.
  SharedOperand matrices[BLOCKS][PAIRS];
  float total[BLOCKS][HEAD_SIZE];
};

// Sums over the tokens of a block that come before and after each of a lane's four.
struct TokenSums {
  float before[4], after[4];

  __device__ __forceinline__ TokenSums(const float (&x)[4], const Lane& lane) {
    const float low = x[0] + x[1], high = x[2] + x[3];
    const wkv6::LeafSums others_low(low, lane), others_high(high, lane);
    before[0] = others_low.earlier;
    before[1] = before[0] + x[0];
    before[2] = others_low.earlier + low + others_low.later + others_high.earlier;
    before[3] = before[2] + x[2];
    after[3] = others_high.later;
    after[2] = after[3] + x[3];
    after[1] = others_low.later + others_high.earlier + high + others_high.later;
    after[0] = after[1] + x[1];
  }
};

// The raw decays of a lane's channels and tokens in a block, once more from global memory.
struct DecayLeaf {
  Leaf w;

  // `source`: the lane's first channel, its first token in the segment's first block.
  __device__ __forceinline__ DecayLeaf(const bf16* source, int step, int first, int valid,
                                       const Lane& lane) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int c = i / 4, t = i % 4, token = t / 2 * 8 + t % 2;
      const bool inside = first + 2 * lane.quad + token < valid;
      w.x[c][t] = inside ? finchtune::to_float(source[token * step + 8 * c]) : -INFINITY;
    }
  }
};

// The state before the block whose first tile row is `row`, from the checkpoint before the chunk.
__device__ __forceinline__ KeySlice state_before(ChunkBackwardShared& shared,
                                                 const float* checkpoint, int row,
                                                 const Lane& lane) {
  RowTiles& rows = shared.rows;
  KeySlice state;
  state.each(lane, [=](float& s, int key, int value) { s = checkpoint[value * HEAD_SIZE + key]; });
  const int key = 16 * lane.warp;
#pragma unroll 1
  for (int earlier = 0; earlier < row; earlier += BLOCK) {
    const float* const total = shared.total[earlier / BLOCK] + key + lane.row;
    const float total_pair[2] = {total[0], total[8]};
    const Operand b = rows.b.load_transposed(earlier, key, lane);
    const Operand k = rows.k.load_transposed(earlier, key, lane);
#pragma unroll
    for (int j = 0; j < SLICES; j++) {
      multiply_add(state.x[j], b, shared.u.load_transposed_right(earlier, 16 * j, lane));
      multiply_add(state.x[j], k, rows.v.load_transposed_right(earlier, 16 * j, lane));
#pragma unroll
      for (int i = 0; i < 8; i++) state.x[j].x[i] *= total_pair[i / 2 % 2];
    }
  }
  return state;
}

// Gradients of rt, kt, at, bt, channels x tokens, and what the gradient of the log decay of every
// token of the block has in common, for the lane's two channels.
struct KeyGradients {
  Operand rt, kt, at, bt;
  Accumulator r, k, a, b;
  float through[2] = {};

  __device__ __forceinline__ KeyGradients(RowTiles& rows, int row, const Lane& lane)
      : rt(rows.r.load_transposed(row, 16 * lane.warp, lane)),
        kt(rows.k.load_transposed(row, 16 * lane.warp, lane)),
        at(rows.a.load_transposed(row, 16 * lane.warp, lane)),
        bt(rows.b.load_transposed(row, 16 * lane.warp, lane)) {}

  // The share of G, the gradient of the state after the block, published in shared memory.
  __device__ __forceinline__ void add_gradient(ChunkBackwardShared& shared, const KeySlice& state,
                                               int row, const Lane& lane) {
#pragma unroll
    for (int j = 0; j < SLICES; j++) {
      const Operand g = shared.solved_a.load_transposed(16 * j, 16 * lane.warp, lane);
      multiply_add(k, g, shared.rows.v.load_right(row, 16 * j, lane));
      multiply_add(b, g, shared.u.load_right(row, 16 * j, lane));
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const uint32_t pair = g.pair[i / 2];
        through[i / 2 % 2] += state.x[j].x[i] * (i % 2 == 0 ? low_half(pair) : high_half(pair));
      }
    }
    const Leaf k_leaf = as_leaf(kt), b_leaf = as_leaf(bt), dk = as_leaf(k), db = as_leaf(b);
#pragma unroll
    for (int c = 0; c < 2; c++) {
#pragma unroll
      for (int t = 0; t < 4; t++) {
        through[c] += k_leaf.x[c][t] * dk.x[c][t] + b_leaf.x[c][t] * db.x[c][t];
      }
      through[c] = wkv6::quad_sum(through[c]);
    }
  }

  // The share of the state before the block.
  __device__ __forceinline__ void add_state(ChunkBackwardShared& shared, const KeySlice& state,
                                            int row, const Lane& lane) {
#pragma unroll
    for (int j = 0; j < SLICES; j++) {
      const Operand s = as_operand(state.x[j]);
      multiply_add(r, s, shared.dy.load_right(row, 16 * j, lane));
      multiply_add(a, s, shared.solved_b.load_right(row, 16 * j, lane));
    }
  }

  // The share of the other tokens of the block.
  __device__ __forceinline__ void add_pairs(const SharedOperand* pairs, const Lane& lane) {
    const Operand zu = pairs[ZU].load(lane), zv = pairs[ZV].load(lane);
    const Operand yu = pairs[YU].load(lane), yv = pairs[YV].load(lane);
    multiply_add(a, bt, zu);
    multiply_add(a, kt, zv);
    multiply_add(r, bt, yu);
    multiply_add(r, kt, yv);
    multiply_add(b, at, transposed(zu));
    multiply_add(b, rt, transposed(yu));
    multiply_add(k, at, transposed(zv));
    multiply_add(k, rt, transposed(yv));
  }

  // Multiplied by its factor, each replaces the warp's columns of its input; dw takes those of u.
  //
  // The gradient of the log decay of token t sums over what is read at t or later, and not over what
  // was written then, with all of it in the common part. What it adds and subtracts of a pair of
  // tokens is the same number, of the same rounded factors, so it cancels to the precision of fp32.
  __device__ __forceinline__ void store(ChunkBackwardShared& shared, const DecayLeaf& decay,
                                        int row, const Lane& lane) {
    RowTiles& rows = shared.rows;
    const int key = 16 * lane.warp;
    const Leaf r_leaf = as_leaf(rt), k_leaf = as_leaf(kt);
    const Leaf a_leaf = as_leaf(at), b_leaf = as_leaf(bt);
    Leaf dr = as_leaf(r), dk = as_leaf(k), da = as_leaf(a), db = as_leaf(b), dw;
#pragma unroll
    for (int c = 0; c < 2; c++) {
      float log2[4], crossing[4], read_before[4];
#pragma unroll
      for (int t = 0; t < 4; t++) {
        log2[t] = log2_decay(decay.w.x[c][t]);
        read_before[t] = a_leaf.x[c][t] * da.x[c][t];
        crossing[t] = r_leaf.x[c][t] * dr.x[c][t] - k_leaf.x[c][t] * dk.x[c][t] -
                      b_leaf.x[c][t] * db.x[c][t] + read_before[t];
      }
      const TokenSums products(log2, lane), later(crossing, lane);
#pragma unroll
      for (int t = 0; t < 4; t++) {
        const float sum = products.before[t] + log2[t], inverse = exp2_approx(-sum);
        dr.x[c][t] *= exp2_approx(sum);
        da.x[c][t] *= exp2_approx(products.before[t]);
        dk.x[c][t] *= inverse;
        db.x[c][t] *= inverse;
        const float of_log = through[c] + later.after[t] + crossing[t] - read_before[t];
        dw.x[c][t] = log2[t] == STRONGEST ? 0.0f : of_log * log2[t] * (1.0f / wkv6::LOG2_E);
      }
    }
    rows.r.store(row, key, transposed(as_operand(dr)), lane);
    rows.k.store(row, key, transposed(as_operand(dk)), lane);
    rows.a.store(row, key, transposed(as_operand(da)), lane);
    rows.b.store(row, key, transposed(as_operand(db)), lane);
    shared.u.store(row, key, transposed(as_operand(dw)), lane);
  }
};

}  // namespace wkv7

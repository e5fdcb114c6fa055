// One block of 16 tokens: its decay factors and its scores
//
//   A[t][s] = sum_n r_t[n] k_s[n] prod_{s<l<t} d_l[n]  (s < t),
//   A[t][t] = sum_n r_t[n] u[n] k_t[n]
//
// The tokens form a binary tree. Where a pair (t, s) is first split, into a row half with t and a
// column half with s, its decay is (product from the boundary to t) * (product from s to the
// boundary): two factors in (0, 1], one for each operand, so nothing overflows and nothing is
// divided. Level 8 splits the block (rows: leaves 2 and 3), level 4 splits each half (rows: leaves
// 1 and 3), and pairs inside a leaf of four are summed in fp32. At a level every token is either a
// row or a column, so one fragment holds both operands of that level.
#pragma once

#include "fragments.cuh"

namespace wkv6 {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float LOG2_E = 1.44269504f;

// -exp(w): the logarithm of the decay; minus infinity for very large w, as -infinity gives 0.
__device__ __forceinline__ Leaf log_decay(const Leaf& w) {
  Leaf result;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    result.x[i / 4][i % 4] = -exp2_approx(LOG2_E * w.x[i / 4][i % 4]);
  }
  return result;
}

__device__ __forceinline__ Leaf decay(const Leaf& log_decay) {
  Leaf result;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    result.x[i / 4][i % 4] = exp2_approx(LOG2_E * log_decay.x[i / 4][i % 4]);
  }
  return result;
}

// Products of a lane's decays, for its two channels.
struct DecayProducts {
  Leaf before, after;          // over the tokens of the leaf before, after each token
  float earlier[2], later[2];  // over the leaves of the block before, after this one
  float total[2];              // over the block
  float far[2];  // level 8: over the leaf between this one and the boundary, 1 where none is

  __device__ __forceinline__ DecayProducts(const Leaf& d, const Lane& lane) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
      before.x[c][0] = after.x[c][3] = 1.0f;
#pragma unroll
      for (int i = 1; i < 4; i++) {
        before.x[c][i] = before.x[c][i - 1] * d.x[c][i - 1];
        after.x[c][3 - i] = after.x[c][4 - i] * d.x[c][4 - i];
      }
      const float leaf = before.x[c][3] * d.x[c][3];
      const float neighbour = __shfl_xor_sync(ALL_LANES, leaf, 1);
      const float half = leaf * neighbour;
      const float other_half = __shfl_xor_sync(ALL_LANES, half, 2);
      const bool odd = lane.quad & 1, upper = lane.quad & 2;
      earlier[c] = (odd ? neighbour : 1.0f) * (upper ? other_half : 1.0f);
      later[c] = (odd ? 1.0f : neighbour) * (upper ? 1.0f : other_half);
      total[c] = half * other_half;
      far[c] = odd == upper ? neighbour : 1.0f;
    }
  }

  // Factor of r: the decay from the start of the block to token i.
  __device__ __forceinline__ float from_start(int c, int i) const {
    return before.x[c][i] * earlier[c];
  }
  // Factor of k: the decay from token i to the end of the block.
  __device__ __forceinline__ float to_end(int c, int i) const { return after.x[c][i] * later[c]; }
};

// Whether the tokens of a lane's leaf are rows at a level.
struct TreeRows {
  bool level4, level8;
  __device__ __forceinline__ explicit TreeRows(const Lane& lane)
      : level4(lane.quad & 1), level8(lane.quad & 2) {}
};

// Decay between a token and the level's boundary.
__device__ __forceinline__ float level4_factor(const DecayProducts& d, TreeRows rows, int c,
                                               int i) {
  return rows.level4 ? d.before.x[c][i] : d.after.x[c][i];
}
__device__ __forceinline__ float level8_factor(const DecayProducts& d, TreeRows rows, int c,
                                               int i) {
  return (rows.level8 ? d.before.x[c][i] : d.after.x[c][i]) * d.far[c];
}

// Both operands of each level: r times its factor for rows, k times its factor for columns.
struct TreeOperands {
  Operand level4, level8;

  __device__ __forceinline__ TreeOperands(const Leaf& r, const Leaf& k, const DecayProducts& d,
                                          TreeRows rows) {
    Leaf four, eight;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int c = i / 4, t = i % 4;
      four.x[c][t] = (rows.level4 ? r.x[c][t] : k.x[c][t]) * level4_factor(d, rows, c, t);
      eight.x[c][t] = (rows.level8 ? r.x[c][t] : k.x[c][t]) * level8_factor(d, rows, c, t);
    }
    level4 = as_operand(four);
    level8 = as_operand(eight);
  }
};

// Where a lane's part of a tokens x tokens fragment lies. Its rows g and g + 8 are tokens
// g % 2 and 2 + g % 2 of leaf g / 2, its columns the tokens of leaf q.
struct PairPlace {
  bool level4, level8, leaf;  // the level at which row and column are split
  bool below;                 // the row's leaf is later than the column's
  bool odd;                   // row c (0 or 1) is token 2c + odd of its leaf

  __device__ __forceinline__ explicit PairPlace(const Lane& lane) {
    const int row_leaf = lane.row / 2, column_leaf = lane.quad;
    level8 = row_leaf >= 2 && column_leaf < 2;
    level4 = row_leaf % 2 == 1 && column_leaf == row_leaf - 1;
    leaf = row_leaf == column_leaf;
    below = row_leaf > column_leaf;
    odd = lane.row % 2;
  }
};

// Scores inside the leaves: s[a][b] for token a and an earlier or the same token b of leaf q,
// summed over the channels given so far.
struct LeafScores {
  float s[4][4] = {};

  __device__ __forceinline__ void add(const Leaf& r, const Leaf& k, const Leaf& d,
                                      const float (&u)[2]) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
#pragma unroll
      for (int b = 0; b < 4; b++) {
        s[b][b] += r.x[c][b] * u[c] * k.x[c][b];
        float decayed = k.x[c][b];
#pragma unroll
        for (int a = b + 1; a < 4; a++) {
          s[a][b] += r.x[c][a] * decayed;
          decayed *= d.x[c][a];
        }
      }
    }
  }

  // Sums over the lanes of the same leaf; all of them get the sums.
  __device__ __forceinline__ void reduce() {
#pragma unroll
    for (int a = 0; a < 4; a++) {
#pragma unroll
      for (int b = 0; b <= a; b++) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          s[a][b] += __shfl_xor_sync(ALL_LANES, s[a][b], step);
        }
      }
    }
  }
};

// Computes the scores of the block whose first tile row is `row`, and on the way writes the
// operands of the recurrence: kt = k decayed to the end of the block, the decay over the whole
// block, and, unless rt is NULL, rt = r decayed from its start. rt may be r and kt may be k itself.
// A warp does one block.
__device__ __forceinline__ Operand prepare_block(Tile& r_tile, Tile& k_tile, Tile& w_tile, Tile* rt,
                                                 Tile& kt, float* total, const float* u, int row,
                                                 const Lane& lane) {
  Accumulator level4, level8;
  LeafScores leaf;
#pragma unroll 1  // unrolled, it needs more registers than three thread blocks leave each other
  for (int n = 0; n < HEAD_SIZE; n += 16) {
    const Leaf r = as_leaf(r_tile.load_transposed(row, n, lane));
    const Leaf k = as_leaf(k_tile.load_transposed(row, n, lane));
    const Leaf d = decay(log_decay(as_leaf(w_tile.load_transposed(row, n, lane))));
    const DecayProducts products(d, lane);

    const TreeOperands tree(r, k, products, TreeRows(lane));
    const Operand four = transposed(tree.level4), eight = transposed(tree.level8);
    multiply_add(level4, four, four);
    multiply_add(level8, eight, eight);
    const float u_pair[2] = {u[n + lane.row], u[n + lane.row + 8]};
    leaf.add(r, k, d, u_pair);

    Leaf r_decayed, k_decayed;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int c = i / 4, t = i % 4;
      r_decayed.x[c][t] = r.x[c][t] * products.from_start(c, t);
      k_decayed.x[c][t] = k.x[c][t] * products.to_end(c, t);
    }
    __syncwarp();  // the lanes have read what is overwritten now
    if (rt != nullptr) rt->store(row, n, transposed(as_operand(r_decayed)), lane);
    kt.store(row, n, transposed(as_operand(k_decayed)), lane);
    if (lane.quad == 0) {
      total[n + lane.row] = products.total[0];
      total[n + lane.row + 8] = products.total[1];
    }
  }
  leaf.reduce();

  const PairPlace place(lane);
  const Leaf four = as_leaf(level4), eight = as_leaf(level8);
  Leaf scores;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int c = i / 4, s = i % 4;
    const float inside = place.odd ? leaf.s[2 * c + 1][s] : leaf.s[2 * c][s];
    scores.x[c][s] = place.level8   ? eight.x[c][s]
                     : place.level4 ? four.x[c][s]
                     : place.leaf   ? inside
                                    : 0.0f;
  }
  return as_operand(scores);
}

}  // namespace wkv6

// The gradients of a block of 16 tokens for a lane's two channels and four tokens, from the products
// that the tensor cores made.
//
// The gradient of the log decay of token t sums what crosses it, and never subtracts (r*dr - k*dk,
// the shorter way, cancels when strong and weak decays meet):
//
//   total * sum_v S G + sum_{i>t} r_i dr_i + sum_{j<t} k_j dk_j + sum_{j<t<i} dA_ij r_i k_j D_ij,
//
// the second and third over the state's share of dr and dk, the last level by level: an exclusive
// suffix sum of r*dr over the level's rows or an exclusive prefix sum of k*dk over its columns.
#pragma once

#include "block.cuh"

namespace wkv6 {

// Sum over the four lanes of a row.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// dA between rows and columns of each tree level, and its transpose: symmetric fragments.
struct LevelGradients {
  Operand level4, level8;

  __device__ __forceinline__ LevelGradients(const Operand& scores, const Lane& lane) {
    const PairPlace place(lane);
    const Operand below = chosen(place.below, scores, Operand{}), above = transposed(below);
    const bool split8 = lane.row / 4 != lane.quad / 2;  // the two leaves are of different halves
    const uint32_t mask4 = split8 || place.leaf ? 0 : ~0u, mask8 = split8 ? ~0u : 0;
#pragma unroll
    for (int p = 0; p < 4; p++) {
      level4.pair[p] = (below.pair[p] | above.pair[p]) & mask4;
      level8.pair[p] = (below.pair[p] | above.pair[p]) & mask8;
    }
  }
};

// Sums over the leaves of the block other than a lane's own.
struct LeafSums {
  float earlier, later, neighbour;
  __device__ __forceinline__ LeafSums(float own, const Lane& lane) {
    neighbour = __shfl_xor_sync(ALL_LANES, own, 1);
    const float other_half = __shfl_xor_sync(ALL_LANES, own + neighbour, 2);
    const bool odd = lane.quad & 1, upper = lane.quad & 2;
    earlier = (odd ? neighbour : 0.0f) + (upper ? other_half : 0.0f);
    later = (odd ? 0.0f : neighbour) + (upper ? 0.0f : other_half);
  }
};

// What the key slice of a block is made of, for a lane's two channels and four tokens.
struct BlockInputs {
  Leaf r, k, log_decay, decay;
  Leaf state_r, state_k;    // dY S^T and V G^T, without their decay factors
  Leaf level4, level8;      // products of each level, likewise
  float state_gradient[2];  // sum_v S G
};

struct BlockGradients {
  Leaf dr, dk, dw;
};

// The shares of the state and of the tree levels for channel c.
__device__ __forceinline__ void state_and_tree_gradients(BlockGradients& out, const BlockInputs& in,
                                                         const DecayProducts& products, int c,
                                                         const Lane& lane) {
  const TreeRows rows(lane);
  const float row4 = rows.level4, row8 = rows.level8, column4 = 1.0f - row4, column8 = 1.0f - row8;
  float rdr[4], kdk[4];  // what the suffix and the prefix sums of the log decay run over
  float state_rdr = 0.0f, state_kdk = 0.0f, far_sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float r = in.r.x[c][i], k = in.k.x[c][i];
    out.dr.x[c][i] = products.from_start(c, i) * in.state_r.x[c][i];
    out.dk.x[c][i] = products.to_end(c, i) * in.state_k.x[c][i];
    state_rdr += r * out.dr.x[c][i];
    state_kdk += k * out.dk.x[c][i];

    const float four = level4_factor(products, rows, c, i) * in.level4.x[c][i];
    const float eight = level8_factor(products, rows, c, i) * in.level8.x[c][i];
    out.dr.x[c][i] += row4 * four + row8 * eight;
    out.dk.x[c][i] += column4 * four + column8 * eight;
    rdr[i] = r * out.dr.x[c][i];
    kdk[i] = k * out.dk.x[c][i];
    far_sum += (rows.level8 ? r : k) * eight;
  }
  const LeafSums state_r(state_rdr, lane), state_k(state_kdk, lane), far(far_sum, lane);
  // At level 8, leaf 3 comes after leaf 2 among the rows, leaf 0 before leaf 1 among the columns.
  float suffix = state_r.later + (lane.quad == 2 ? far.neighbour : 0.0f);
  float prefix = state_k.earlier + (lane.quad == 1 ? far.neighbour : 0.0f);
  const float through = products.total[c] * in.state_gradient[c];
#pragma unroll
  for (int i = 3; i >= 0; i--) {
    out.dw.x[c][i] = through + suffix;
    suffix += rdr[i];
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    out.dw.x[c][i] += prefix;
    prefix += kdk[i];
  }
}

// The share of the pairs inside the leaf for channel c. Returns the gradient of u.
__device__ __forceinline__ float leaf_gradients(BlockGradients& out, const BlockInputs& in,
                                                const float (&da)[4][4], float u, int c) {
  float du = 0.0f;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const float r = in.r.x[c][j], k = in.k.x[c][j];
    out.dr.x[c][j] += da[j][j] * u * k;
    out.dk.x[c][j] += da[j][j] * u * r;
    du += da[j][j] * r * k;
    float decayed = 1.0f;
#pragma unroll
    for (int i = j + 1; i < 4; i++) {
      const float pair = da[i][j] * decayed;
      out.dr.x[c][i] += pair * k;
      out.dk.x[c][j] += pair * in.r.x[c][i];
#pragma unroll
      for (int t = j + 1; t < i; t++) out.dw.x[c][t] += pair * k * in.r.x[c][i];
      decayed *= in.decay.x[c][i];
    }
  }
  return du;
}

}  // namespace wkv6

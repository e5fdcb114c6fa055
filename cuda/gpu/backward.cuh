// The backward for 64 channels in bf16, on tensor cores. A thread block does one head of one
// segment, from its last chunk to its first; warp j owns the key channels 16j .. 16j+15 and keeps
// its part of G, the gradient of the state (16 keys x 64 values), in registers throughout. Per
// chunk of 64 tokens:
//
//   1. warp x prepares block x: scores A, kt, and dA = dY V^T, which is kept as one symmetric
//      fragment for each tree level, the leaves in fp32;
//   2. for each block, last first, with S the state before it, from the checkpoint:
//        per key slice:   dr = from_start * (dY S^T) + pairs,   dk = to_end * (V G^T) + pairs,
//                         dw, du, and G = diag(total) G + rt^T dY;
//        per value slice: dv = A^T dY + kt G.
//
// The gradient of the log decay of token t sums what crosses it, and never subtracts (r*dr - k*dk,
// the shorter way, cancels when strong and weak decays meet):
//
//   total * sum_v S G + sum_{i>t} r_i dr_i + sum_{j<t} k_j dk_j + sum_{j<t<i} dA_ij r_i k_j D_ij,
//
// the second and third over the state's share of dr and dk, the last level by level: an exclusive
// suffix sum of r*dr over the level's rows or an exclusive prefix sum of k*dk over its columns.
#pragma once

#include "forward.cuh"

namespace wkv6 {

constexpr int BACKWARD_BLOCKS = 3;  // thread blocks for each multiprocessor

struct BackwardArgs {
  Wkv6Problem problem;
  Segments segments;
  const bf16 *r, *k, *v, *w, *dy;
  const float* u;
  const float* dstate_out;  // (slots, 64, 64): of every segment; or NULL
  const uint4* checkpoints;
  bf16 *dr, *dk, *dv, *dw;
  float* du;  // (slots, 64)
  float* dstate_in;
};

struct BackwardShared {
  Tile r, k, v, w, dy;  // r, k, v, w become dr, dk, dv, dw
  Tile kt;
  Tile g;                                        // G of the current block, keys x values
  SharedOperand scores[BLOCKS];                  // A transposed
  SharedOperand level4[BLOCKS], level8[BLOCKS];  // dA between rows and columns, and its transpose
  float leaf[BLOCKS][4][4][4];                   // dA of leaf, row, column
  float total[BLOCKS][HEAD_SIZE];
};

// The 16 keys x 64 values of the state, or of its gradient, that a warp owns.
struct KeySlice {
  Accumulator x[SLICES];

  // Calls f(element, key channel, value channel) for all that the lane holds.
  template <typename F>
  __device__ __forceinline__ void each(const Lane& lane, F f) {
#pragma unroll
    for (int j = 0; j < SLICES; j++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int key = 16 * lane.warp + lane.row + i / 2 % 2 * 8;
        f(x[j].x[i], key, 16 * j + i / 4 * 8 + 2 * lane.quad + i % 2);
      }
    }
  }

  // x = diag(total) x + keys values, keys (keys x tokens) in registers, the values' tile rows from
  // `row`.
  __device__ __forceinline__ void advance(const float (&total)[2], const Operand& keys,
                                          Tile& values, int row, const Lane& lane) {
#pragma unroll
    for (int j = 0; j < SLICES; j++) {
#pragma unroll
      for (int i = 0; i < 8; i++) x[j].x[i] *= total[i / 2 % 2];
      multiply_add(x[j], keys, values.load_transposed(row, 16 * j, lane));
    }
  }
};

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
  for (int earlier = 0; earlier < row; earlier += BLOCK) {
    const float* const total = shared.total[earlier / BLOCK] + key + lane.row;
    const float total_pair[2] = {total[0], total[8]};
    state.advance(total_pair, shared.kt.load_transposed(earlier, key, lane), shared.v, earlier,
                  lane);
  }
  return state;
}

// Sum over the four lanes of a row.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// dA of the block, split for the key slices.
__device__ __forceinline__ void prepare_score_gradients(BackwardShared& shared, int row,
                                                        const Lane& lane) {
  Accumulator product;
#pragma unroll
  for (int v = 0; v < HEAD_SIZE; v += 16) {
    multiply_add(product, shared.dy.load(row, v, lane), shared.v.load(row, v, lane));
  }
  const Leaf da = as_leaf(product);
  const PairPlace place(lane);
  const auto symmetric = [&](bool condition) {
    const Operand rows = as_operand(keep_if(condition, da));
    const Operand columns = transposed(rows);
    Operand sum;  // one of the two is zero everywhere
#pragma unroll
    for (int p = 0; p < 4; p++) sum.pair[p] = rows.pair[p] | columns.pair[p];
    return sum;
  };
  const int block = row / BLOCK;
  shared.level4[block].store(symmetric(place.level4), lane);
  shared.level8[block].store(symmetric(place.level8), lane);
  if (place.leaf) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      shared.leaf[block][lane.quad][2 * (i / 4) + place.odd][i % 4] = da.x[i / 4][i % 4];
    }
  }
}

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
  float rdr[4], kdk[4];  // what the suffix and the prefix sums of the log decay run over
  float state_rdr = 0.0f, state_kdk = 0.0f, far_sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float r = in.r.x[c][i], k = in.k.x[c][i];
    out.dr.x[c][i] = products.from_start(c, i) * in.state_r.x[c][i];
    out.dk.x[c][i] = products.to_end(c, i) * in.state_k.x[c][i];
    rdr[i] = r * out.dr.x[c][i];
    kdk[i] = k * out.dk.x[c][i];
    state_rdr += rdr[i];
    state_kdk += kdk[i];

    const float four = level4_factor(products, rows, c, i) * in.level4.x[c][i];
    const float eight = level8_factor(products, rows, c, i) * in.level8.x[c][i];
    out.dr.x[c][i] += (rows.level4 ? four : 0.0f) + (rows.level8 ? eight : 0.0f);
    out.dk.x[c][i] += (rows.level4 ? 0.0f : four) + (rows.level8 ? 0.0f : eight);
    rdr[i] += (rows.level4 ? r * four : 0.0f) + (rows.level8 ? r * eight : 0.0f);
    kdk[i] += (rows.level4 ? 0.0f : k * four) + (rows.level8 ? 0.0f : k * eight);
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

// dr, dk, dw of the block for the warp's key channels, in place of r, k, w; G, published in
// shared.g and then taken to the block's start; du.
__device__ __forceinline__ void key_slice_gradients(BackwardShared& shared, KeySlice& state,
                                                    KeySlice& g, float (&du)[2], const float* u,
                                                    int row, int valid, const Lane& lane) {
  const int key = 16 * lane.warp, block = row / BLOCK;
  BlockInputs in;
  in.r = as_leaf(shared.r.load_transposed(row, key, lane));
  in.k = as_leaf(shared.k.load_transposed(row, key, lane));
  in.log_decay = log_decay(as_leaf(shared.w.load_transposed(row, key, lane)));
  in.decay = decay(in.log_decay, valid, lane);
  const DecayProducts products(in.decay, lane);

  Accumulator state_r, state_k, level4, level8;
  in.state_gradient[0] = in.state_gradient[1] = 0.0f;
#pragma unroll
  for (int j = 0; j < SLICES; j++) {
    const Operand g_operand = as_operand(g.x[j]);
    shared.g.store(key, 16 * j, g_operand, lane);
    multiply_add(state_r, as_operand(state.x[j]), shared.dy.load(row, 16 * j, lane));
    multiply_add(state_k, g_operand, shared.v.load(row, 16 * j, lane));
#pragma unroll
    for (int i = 0; i < 8; i++) in.state_gradient[i / 2 % 2] += state.x[j].x[i] * g.x[j].x[i];
  }
  const TreeOperands tree(in.r, in.k, products, TreeRows(lane));
  multiply_add(level4, tree.level4, shared.level4[block].load(lane));
  multiply_add(level8, tree.level8, shared.level8[block].load(lane));
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
      out.dw.x[c][i] *= in.log_decay.x[c][i];
      r_decayed.x[c][i] = in.r.x[c][i] * products.from_start(c, i);
    }
  }
  __syncwarp();  // all lanes have read r, k, w
  shared.r.store(row, key, transposed(as_operand(out.dr)), lane);
  shared.k.store(row, key, transposed(as_operand(out.dk)), lane);
  shared.w.store(row, key, transposed(as_operand(out.dw)), lane);
  g.advance(products.total, as_operand(r_decayed), shared.dy, row, lane);
}

// dv of the block for the warp's value channels, in place of v.
__device__ __forceinline__ void value_slice_gradients(BackwardShared& shared, int row,
                                                      const Lane& lane) {
  const int value = 16 * lane.warp;
  Accumulator dv;  // tokens x values
  multiply_add(dv, shared.scores[row / BLOCK].load(lane),
               shared.dy.load_transposed(row, value, lane));
#pragma unroll
  for (int n = 0; n < HEAD_SIZE; n += 16) {
    multiply_add(dv, shared.kt.load(row, n, lane), shared.g.load_transposed(n, value, lane));
  }
  shared.v.store(row, value, as_operand(dv), lane);
}

__device__ __forceinline__ void load_backward_chunk(BackwardShared& shared,
                                                    const BackwardArgs& args, const Work& work,
                                                    int64_t t0) {
  load_chunk(shared.r, args.r, args.problem, work, t0);
  load_chunk(shared.k, args.k, args.problem, work, t0);
  load_chunk(shared.w, args.w, args.problem, work, t0);
  load_chunk(shared.v, args.v, args.problem, work, t0);
  load_chunk(shared.dy, args.dy, args.problem, work, t0);
  async_commit();
  async_wait<0>();
}

__device__ __forceinline__ void store_backward_chunk(BackwardShared& shared,
                                                     const BackwardArgs& args, const Work& work,
                                                     int64_t t0) {
  store_chunk(args.dr, shared.r, args.problem, work, t0);
  store_chunk(args.dk, shared.k, args.problem, work, t0);
  store_chunk(args.dw, shared.w, args.problem, work, t0);
  store_chunk(args.dv, shared.v, args.problem, work, t0);
}

__global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS) backward_kernel(BackwardArgs args) {
  const Wkv6Problem& problem = args.problem;
  const Work work(problem, args.segments, blockIdx.x);
  BackwardShared& shared = shared_memory<BackwardShared>();
  const Lane lane;
  const float* const u = args.u + work.head * HEAD_SIZE;

  KeySlice g;
  float du[2] = {};
  if (args.dstate_out != nullptr && (work.length > 0 || work.last)) {
    const float* const final_gradient = args.dstate_out + work.slot * HEAD_SIZE * HEAD_SIZE;
    g.each(lane,
           [=](float& x, int key, int value) { x = final_gradient[key * HEAD_SIZE + value]; });
  }
  for (int chunk = work.chunks() - 1; chunk >= 0; chunk--) {
    const int64_t t0 = static_cast<int64_t>(chunk) * CHUNK;
    const int valid = valid_tokens(work, t0), blocks = used_blocks(valid);
    // No barrier before the loads: a thread overwrites what it has just stored itself, and tiles
    // that were last read before the barrier above.
    load_backward_chunk(shared, args, work, t0);
    __syncthreads();
    if (lane.warp < blocks) {
      const int row = lane.warp * BLOCK;
      const Operand scores = prepare_block(shared.r, shared.k, shared.w, nullptr, shared.kt,
                                           shared.total[lane.warp], u, row, valid - row, lane);
      shared.scores[lane.warp].store(transposed(scores), lane);
      prepare_score_gradients(shared, row, lane);
    }
    __syncthreads();
    const uint4* const checkpoint =
        args.checkpoints + work.checkpoint_index(problem, chunk) * CHECKPOINT_PIECES;
    for (int row = (blocks - 1) * BLOCK; row >= 0; row -= BLOCK) {
      KeySlice state = state_before(shared, checkpoint, row, lane);
      key_slice_gradients(shared, state, g, du, u, row, valid - row, lane);
      __syncthreads();  // shared.g is complete, and no warp needs v of this block any more
      value_slice_gradients(shared, row, lane);
      __syncthreads();  // shared.g may be overwritten
    }
    store_backward_chunk(shared, args, work, t0);
  }

  float* const du_slot = args.du + work.slot * HEAD_SIZE + 16 * lane.warp + lane.row;
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

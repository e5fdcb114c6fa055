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
constexpr float STRONGEST = 4e34f;  // of -log decay as a factor

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
#pragma unroll 1
  for (int earlier = 0; earlier < row; earlier += BLOCK) {
    const float* const total = shared.total[earlier / BLOCK] + key + lane.row;
    const float total_pair[2] = {total[0], total[8]};
    state.advance(total_pair, shared.k.load_transposed(earlier, key, lane), shared.v, earlier,
                  lane);
  }
  return state;
}

// Sum over the four lanes of a row.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// dA of the block, beside its scores.
__device__ __forceinline__ void prepare_score_gradients(BackwardShared& shared,
                                                        const Operand& scores, int row,
                                                        const Lane& lane) {
  Accumulator product;
#pragma unroll
  for (int v = 0; v < HEAD_SIZE; v += 16) {
    multiply_add(product, shared.dy.load(row, v, lane), shared.v.load(row, v, lane));
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
    *shared.g_place(row, lane.warp, j, lane) = {published.pair[0], published.pair[1],
                                                published.pair[2], published.pair[3]};
    multiply_add(state_r, as_operand(state.x[j]), shared.dy.load(row, 16 * j, lane));
    multiply_add(state_k, g_operand, shared.v.load(row, 16 * j, lane));
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
  multiply_add(dv, scores, shared.dy.load_transposed(row, value, lane));
#pragma unroll
  for (int n = 0; n < SLICES; n++) {
    const uint4 g = *shared.g_place(row, n, lane.warp, lane);
    multiply_add(dv, shared.k.load(row, 16 * n, lane), {g.x, g.y, g.z, g.w});
  }
  shared.v.store(row, value, as_operand(dv), lane);
}

__device__ __forceinline__ void load_backward_chunk(BackwardShared& shared,
                                                    const BackwardArgs& args, const Pieces& pieces,
                                                    int64_t offset, int valid) {
  load_chunk(shared.r, args.r + offset, pieces, valid);
  load_chunk(shared.k, args.k + offset, pieces, valid);
  load_chunk(shared.w, args.w + offset, pieces, valid);
  load_chunk(shared.v, args.v + offset, pieces, valid);
  load_chunk(shared.dy, args.dy + offset, pieces, valid);
  async_commit();
  async_wait<0>();
  if (valid < CHUNK) clear_decay(shared.w, pieces, valid);
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
      work.last ? state_of(args.dstate_out, work.state_index(problem))
                : state_of(args.entering, blockIdx.x - args.segments.whole);
  if (final_gradient != nullptr && (work.length > 0 || work.last)) {
    g.each(lane,
           [=](float& x, int key, int value) { x = final_gradient[key * HEAD_SIZE + value]; });
  }
  const int64_t checkpoint_step = problem.H * CHECKPOINT_PIECES;
  const uint4* checkpoint =
      args.checkpoints + work.checkpoint_index(problem, work.chunks()) * CHECKPOINT_PIECES;
  const Pieces pieces(problem, work);
  const KeyColumns k_columns(args.k, problem, work, lane);
  for (int chunk = work.chunks() - 1; chunk >= 0; chunk--) {
    const int valid = valid_tokens(work, chunk), blocks = used_blocks(valid);
    const int64_t offset = pieces.of_chunk(chunk);
    // No barrier before the loads: a thread overwrites what it has just stored itself, and dy,
    // last read before the barrier above.
    load_backward_chunk(shared, args, pieces, offset, valid);
    __syncthreads();
    if (lane.warp < blocks) {
      const int row = lane.warp * BLOCK;
      const Operand scores = prepare_block(shared.r, shared.k, shared.w, nullptr, shared.k,
                                           shared.total[lane.warp], u, row, lane);
      prepare_score_gradients(shared, scores, row, lane);
    }
    __syncthreads();
    checkpoint -= checkpoint_step;
#pragma unroll 1
    for (int row = (blocks - 1) * BLOCK; row >= 0; row -= BLOCK) {
      const Operand k = k_columns.load(chunk, row, valid);
      KeySlice state = state_before(shared, checkpoint, row, lane);
      const KeySliceGradients gradients =
          key_slice_gradients(shared, state, g, du, k, u, row, lane);
      __syncthreads();  // G is complete, and no warp needs v of this block any more
      value_slice_gradients(shared, row, lane);
      __syncthreads();  // all warps are done with G and kt
      gradients.store(shared, row, lane);
    }
    __syncthreads();
    store_backward_chunk(shared, args, pieces, offset, valid);
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

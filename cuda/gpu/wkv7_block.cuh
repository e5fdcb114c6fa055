// A block of 16 tokens of WKV7 on tensor cores, for 64 channels in bf16: what can be computed before
// the state is known. With P_t the product of the decays of the block up to and with token t, and
// P_{-1} = 1,
//
//   at = a P_{t-1}    bt = b / P_t    kt = k / P_t    rt = r P_t          tokens x channels
//   AB = at bt^T,  AK = at kt^T  below the diagonal;  RB = rt bt^T,  RK = rt kt^T  with it
//
// and S the state (values x keys) before the block, what each token reads by a, y and the new state
// are
//
//   u  = (I - AB)^-1 (AK V + at S^T)
//   y  = rt S^T + RB u + RK V            S' = (S + u^T bt + V^T kt) diag(P_15)
//
// The inverse is applied to what does not depend on the state, W = (I - AB)^-1 at and
// TK = (I - AB)^-1 AK, by substitution in fp32: each entry is rounded once, after everything has
// cancelled that cancels where neighbouring tokens read the same key. Every product of decays that
// the scores hold lies in (0, 1]; the factors P and 1/P only split it, and bf16 has the range of
// fp32, so their size costs no precision.
#pragma once

#include "block.cuh"
#include "slices.cuh"

namespace wkv7 {

using wkv6::Accumulator;
using wkv6::as_operand;
using wkv6::bf16;
using wkv6::BLOCK;
using wkv6::BLOCKS;
using wkv6::CHUNK;
using wkv6::exp2_approx;
using wkv6::HEAD_SIZE;
using wkv6::high_half;
using wkv6::Lane;
using wkv6::low_half;
using wkv6::multiply_add;
using wkv6::Operand;
using wkv6::pack;
using wkv6::Pieces;
using wkv6::SharedOperand;
using wkv6::SLICES;
using wkv6::Tile;
using wkv6::transposed;
using wkv6::Work;

// Stronger decays than e^-5 count as e^-5, so that 1/P of a block stays finite; a model's are weaker
// than e^-0.61.
constexpr float STRONGEST = -5.0f * wkv6::LOG2_E;

// The logarithm to base 2 of the decay. NaN passes.
__device__ __forceinline__ float log2_decay(float w) {
  const float x = -wkv6::LOG2_E * exp2_approx(wkv6::LOG2_E * w);
  return x < STRONGEST ? STRONGEST : x;
}

// The inputs of a problem, and their tiles; the tiles become rt, kt, at, bt.
struct RowPointers {
  const bf16 *r, *k, *v, *w, *a, *b;

  // Has the rows of a chunk brought to the level-2 cache.
  __device__ __forceinline__ void prefetch(int64_t offset, const Pieces& pieces, int valid) const {
    prefetch_chunk(r + offset, k + offset, pieces, valid);
    prefetch_chunk(w + offset, v + offset, pieces, valid);
    prefetch_chunk(a + offset, b + offset, pieces, valid);
  }
};
struct RowTiles {
  Tile r, k, v, a, b;

  __device__ __forceinline__ void load(const RowPointers& rows, int64_t offset,
                                       const Pieces& pieces, int valid) {
    load_chunk(r, rows.r + offset, pieces, valid);
    load_chunk(k, rows.k + offset, pieces, valid);
    load_chunk(v, rows.v + offset, pieces, valid);
    load_chunk(a, rows.a + offset, pieces, valid);
    load_chunk(b, rows.b + offset, pieces, valid);
  }
};

// While a block is prepared a lane owns two neighbouring channels: a pair in each row.
__device__ __forceinline__ uint32_t& pair_in(Tile& tile, int row, const Lane& lane) {
  return *reinterpret_cast<uint32_t*>(
      tile.at(Lane::tile_place(row, lane.lane / 4) + lane.lane % 4 * 4));
}

// The raw decays of a block for a lane's two channels. They go from global memory to registers.
struct RawDecays {
  uint32_t pair[BLOCK];

  // `w`: of the first token of the segment. Tokens beyond the segment get minus infinity: no decay.
  __device__ RawDecays(const bf16* w, int chunk, int valid, const Wkv6Problem& problem,
                       const Lane& lane) {
    const int step = static_cast<int>(problem.H * HEAD_SIZE), first = BLOCK * lane.warp;
    const bf16* const source = w + static_cast<int64_t>(chunk * CHUNK + first) * step;
#pragma unroll
    for (int t = 0; t < BLOCK; t++) {
      const bool inside = first + t < valid;
      pair[t] = inside ? *reinterpret_cast<const uint32_t*>(source + 2 * lane.lane + t * step)
                       : 0xff80ff80u;
    }
  }
};

// In fp32, for each token: a lane's two channels, and its column of a 16x16 matrix (lanes 16 and on
// do what those before them do).
struct Columns {
  float x[BLOCK][3];

  __device__ __forceinline__ void store(Tile& tile, int row, const Lane& lane) const {
#pragma unroll
    for (int t = 0; t < BLOCK; t++) pair_in(tile, row + t, lane) = pack(x[t][0], x[t][1]);
  }
  // What rounding took from the rows that `rounded` holds.
  __device__ __forceinline__ void store_rest(Tile& rest, Tile& rounded, int row,
                                             const Lane& lane) const {
#pragma unroll
    for (int t = 0; t < BLOCK; t++) {
      const uint32_t pair = pair_in(rounded, row + t, lane);
      pair_in(rest, row + t, lane) = pack(x[t][0] - low_half(pair), x[t][1] - high_half(pair));
    }
  }
  // The matrix, as an operand.
  __device__ __forceinline__ void store_matrix(SharedOperand& operand, const Lane& lane) const {
    const int column = lane.lane % BLOCK;
    bf16* const elements =
        reinterpret_cast<bf16*>(operand.lanes + column % 8 / 2) + column / 8 * 4 + column % 2;
    if (lane.lane != column) return;
#pragma unroll
    for (int t = 0; t < BLOCK; t++) {
      elements[t % 8 * 32 + t / 8 * 2] = finchtune::from_float<bf16>(x[t][2]);
    }
  }
};

// A 16x16 matrix in fp32 in shared memory.
struct alignas(16) Matrix {
  float x[BLOCK][BLOCK];

  __device__ __forceinline__ void store(const Accumulator& m, const Lane& lane) {
#pragma unroll
    for (int p = 0; p < 4; p++) {
      *reinterpret_cast<float2*>(&x[lane.row + p % 2 * 8][p / 2 * 8 + 2 * lane.quad]) = {
          m.x[2 * p], m.x[2 * p + 1]};
    }
  }

  // Calls f(t, s, element) for every element below the diagonal of row t, or of rows from the last
  // to the first.
  template <typename F>
  __device__ __forceinline__ void each_below(bool from_last, F f) const {
#pragma unroll
    for (int i = 1; i < BLOCK; i++) {
      const int t = from_last ? BLOCK - i : i;
#pragma unroll
      for (int s = 0; s < t; s += 4) {
        const float4 four = *reinterpret_cast<const float4*>(&x[t][s]);
        f(t, s, four.x);
        if (s + 1 < t) f(t, s + 1, four.y);
        if (s + 2 < t) f(t, s + 2, four.z);
        if (s + 3 < t) f(t, s + 3, four.w);
      }
    }
  }
};

// c <- (I - m)^-1 c.
__device__ __forceinline__ void solve(const Matrix& m, Columns& c) {
  m.each_below(false, [&c](int t, int s, float element) {
#pragma unroll
    for (int i = 0; i < 3; i++) c.x[t][i] += element * c.x[s][i];
  });
}

// c <- (I - m)^-T c.
__device__ __forceinline__ void solve_transposed(const Matrix& m, Columns& c) {
  m.each_below(true, [&c](int t, int s, float element) {
#pragma unroll
    for (int i = 0; i < 3; i++) c.x[s][i] += element * c.x[t][i];
  });
}

// Multiplies a pair by its channels' factors, in place; the products in fp32 go to `product`.
__device__ __forceinline__ void scale_pair(uint32_t& pair, const float (&factor)[2],
                                           float* product) {
  product[0] = low_half(pair) * factor[0];
  product[1] = high_half(pair) * factor[1];
  pair = pack(product[0], product[1]);
}

// rt, kt, at, bt of the block whose first tile row is `row`, in place; at and bt also in fp32; and
// the decay over the block.
__device__ __forceinline__ void scale_rows(RowTiles& rows, const RawDecays& w, float* total,
                                           Columns& a, Columns& b, int row, const Lane& lane) {
  float sum[2] = {}, before[2] = {1.0f, 1.0f};
#pragma unroll
  for (int t = 0; t < BLOCK; t++) {
    float after[2], inverse[2], product[2];
#pragma unroll
    for (int c = 0; c < 2; c++) {
      sum[c] += log2_decay(c == 0 ? low_half(w.pair[t]) : high_half(w.pair[t]));
      after[c] = exp2_approx(sum[c]);
      inverse[c] = exp2_approx(-sum[c]);
    }
    scale_pair(pair_in(rows.r, row + t, lane), after, product);
    scale_pair(pair_in(rows.k, row + t, lane), inverse, product);
    scale_pair(pair_in(rows.a, row + t, lane), before, a.x[t]);
    scale_pair(pair_in(rows.b, row + t, lane), inverse, b.x[t]);
    before[0] = after[0], before[1] = after[1];
  }
  *reinterpret_cast<float2*>(total + 2 * lane.lane) = {before[0], before[1]};
}

// m below the diagonal, and on it where `with_diagonal`.
__device__ __forceinline__ Accumulator lower(const Accumulator& m, bool with_diagonal,
                                             const Lane& lane) {
  Accumulator result;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int row = lane.row + i / 2 % 2 * 8, column = 2 * lane.quad + i / 4 * 8 + i % 2;
    result.x[i] = column < row + with_diagonal ? m.x[i] : 0.0f;
  }
  return result;
}

// The scores of the tokens of a block, as those that read (at or rt), with the same tokens, as those
// that were written (bt, kt): tokens x tokens, at first without the mask.
struct Scores {
  Accumulator b, k;

  __device__ __forceinline__ void add(Tile& readers, Tile& b_rows, Tile& k_rows, int row,
                                      const Lane& lane) {
#pragma unroll
    for (int n = 0; n < HEAD_SIZE; n += 16) {
      const Operand reader = readers.load(row, n, lane);
      multiply_add(b, reader, b_rows.load_right(row, n, lane));
      multiply_add(k, reader, k_rows.load_right(row, n, lane));
    }
  }
  __device__ __forceinline__ void mask(bool with_diagonal, const Lane& lane) {
    b = lower(b, with_diagonal, lane);
    k = lower(k, with_diagonal, lane);
  }
};

// What rounding to bf16 took from a fragment.
__device__ __forceinline__ Operand rest_of(const Accumulator& m, const Operand& rounded) {
  Accumulator rest;
#pragma unroll
  for (int p = 0; p < 4; p++) {
    rest.x[2 * p] = m.x[2 * p] - low_half(rounded.pair[p]);
    rest.x[2 * p + 1] = m.x[2 * p + 1] - high_half(rounded.pair[p]);
  }
  return as_operand(rest);
}

// u of a block for the warp's value channels, tokens x values. `v`: values x tokens. TWICE: the state
// as two operands, that it may be large beside what a reads.
template <bool TWICE>
__device__ __forceinline__ Accumulator read_by_a(const wkv6::ValueSlice& state, const Operand& v,
                                                 const SharedOperand& tk, Tile& w, int row,
                                                 const Lane& lane) {
  Accumulator u;
  multiply_add(u, tk.load(lane), v);
#pragma unroll
  for (int j = 0; j < SLICES; j++) {
    const Operand reader = w.load(row, 16 * j, lane), s = as_operand(state.x[j]);
    multiply_add(u, reader, s);
    if (TWICE) multiply_add(u, reader, rest_of(state.x[j], s));
  }
  return u;
}

// The state after a block. `u`, `v`: values x tokens.
__device__ __forceinline__ void advance(wkv6::ValueSlice& state, const Operand& u, const Operand& v,
                                        RowTiles& rows, const float* total, int row,
                                        const Lane& lane) {
#pragma unroll
  for (int j = 0; j < SLICES; j++) {
    multiply_add(state.x[j], u, rows.b.load_transposed_right(row, 16 * j, lane));
    multiply_add(state.x[j], v, rows.k.load_transposed_right(row, 16 * j, lane));
  }
  state.each(lane, [total](float& s, int, int key) { s *= total[key]; });
}

// A state in memory, (64 values, 64 keys) in fp32: two neighbouring keys at a time.
__device__ __forceinline__ void load_state(wkv6::ValueSlice& state, const float* source,
                                           const Lane& lane) {
#pragma unroll
  for (int j = 0; j < SLICES; j++) {
#pragma unroll
    for (int p = 0; p < 4; p++) {
      const int value = 16 * lane.warp + lane.row + p % 2 * 8, key = 16 * j + p / 2 * 8;
      const float2 pair =
          *reinterpret_cast<const float2*>(source + value * HEAD_SIZE + key + 2 * lane.quad);
      state.x[j].x[2 * p] = pair.x, state.x[j].x[2 * p + 1] = pair.y;
    }
  }
}

__device__ __forceinline__ void store_state(const wkv6::ValueSlice& state, float* target,
                                            const Lane& lane) {
#pragma unroll
  for (int j = 0; j < SLICES; j++) {
#pragma unroll
    for (int p = 0; p < 4; p++) {
      const int value = 16 * lane.warp + lane.row + p % 2 * 8, key = 16 * j + p / 2 * 8;
      *reinterpret_cast<float2*>(target + value * HEAD_SIZE + key + 2 * lane.quad) = {
          state.x[j].x[2 * p], state.x[j].x[2 * p + 1]};
    }
  }
}

}  // namespace wkv7

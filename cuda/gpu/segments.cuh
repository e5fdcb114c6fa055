// Heads that do not fill the GPU, all of them or those that are left for its last turn, are cut into
// segments that run side by side. The state that enters a segment is needed first, and it is linear
// in the one before:
//
//   1. segment_kernel: what each segment adds to the state, and its decay for each key channel;
//   2. join_kernel:    segment after segment, the states that enter them;
//   3. the forward (backward) kernel on every segment at once.
//
// The backward does the same to the gradient of the state, from the last segment to the first, with
// r, dy in place of k, v. It needs no forward pre-pass: its states come from the checkpoints.
#pragma once

#include "backward.cuh"

namespace wkv6 {

struct SegmentArgs {
  Wkv6Problem problem;
  Segments segments;
  const bf16 *keys, *values, *w;  // k, v or, for the backward, r, dy
  const float* boundary;  // (n_seq, H, 64, 64) the state at the first (last) segment; or NULL
  float* states;          // (slots, 64, 64)
  float* decays;          // (slots, 64)
};

struct SegmentShared {
  Tile keys, values, w;
};

template <bool BACKWARD>
__global__ void __launch_bounds__(THREADS) segment_kernel(SegmentArgs args) {
  const Wkv6Problem& problem = args.problem;
  const Work work(problem, args.segments, args.segments.whole + blockIdx.x);
  if (work.length == 0 || (BACKWARD ? work.first : work.last)) return;  // nothing follows it
  SegmentShared& shared = shared_memory<SegmentShared>();
  const Lane lane;
  const int key = 16 * lane.warp;

  KeySlice state;
  float segment_decay[2] = {1.0f, 1.0f};
  const Pieces pieces(problem, work);
  const int chunks = work.chunks();
  for (int step = 0; step < chunks; step++) {
    const int chunk = BACKWARD ? chunks - 1 - step : step;
    const int valid = valid_tokens(work, chunk), blocks = used_blocks(valid);
    const int64_t offset = pieces.of_chunk(chunk);
    __syncthreads();  // all warps are done with the last chunk
    load_chunk(shared.keys, args.keys + offset, pieces, valid);
    load_chunk(shared.values, args.values + offset, pieces, valid);
    load_chunk(shared.w, args.w + offset, pieces, valid);
    async_commit();
    wait_for_block<0>(shared.w, pieces, valid);
    __syncthreads();
    for (int i = 0; i < blocks; i++) {
      const int row = (BACKWARD ? blocks - 1 - i : i) * BLOCK;
      const Leaf w = as_leaf(shared.w.load_transposed(row, key, lane));
      const DecayProducts products(decay(log_decay(w)), lane);
      Leaf keys = as_leaf(shared.keys.load_transposed(row, key, lane));
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const int c = e / 4, t = e % 4;
        keys.x[c][t] *= BACKWARD ? products.from_start(c, t) : products.to_end(c, t);
      }
      state.advance(products.total, as_operand(keys), shared.values, row, lane);
      segment_decay[0] *= products.total[0];
      segment_decay[1] *= products.total[1];
    }
  }
  float* const result = args.states + static_cast<int64_t>(blockIdx.x) * HEAD_SIZE * HEAD_SIZE;
  state.each(lane, [=](float& x, int n, int v) { result[n * HEAD_SIZE + v] = x; });
  if (lane.quad == 0) {
    float* const decays =
        args.decays + static_cast<int64_t>(blockIdx.x) * HEAD_SIZE + key + lane.row;
    decays[0] = segment_decay[0];
    decays[8] = segment_decay[1];
  }
}

// Replaces what each segment adds by the state that enters it, for the segments that another one
// comes before. JOIN_BLOCKS thread blocks do one head of one sequence.
constexpr int JOIN_BLOCKS = 4, JOINED = HEAD_SIZE * HEAD_SIZE / THREADS / JOIN_BLOCKS;

template <bool BACKWARD>
__global__ void __launch_bounds__(THREADS) join_kernel(SegmentArgs args) {
  const Wkv6Problem& problem = args.problem;
  const int64_t index = args.segments.whole + blockIdx.x / JOIN_BLOCKS;  // of (sequence, head)
  const int sequence = static_cast<int>(index / problem.H);
  const int head = static_cast<int>(index % problem.H);
  const int64_t length = Sequence(problem, sequence).length;
  const int count = static_cast<int>((length + args.segments.length - 1) / args.segments.length);
  if (count < 2) return;
  const int begin = blockIdx.x % JOIN_BLOCKS * JOINED * THREADS + threadIdx.x;

  float state[JOINED], added[JOINED];
  int segment = BACKWARD ? count - 1 : 0;
  int64_t slot = args.segments.slot(problem, sequence, head, segment);
#pragma unroll
  for (int i = 0; i < JOINED; i++) {
    const int64_t place = begin + i * THREADS;
    const int64_t of_head = index * HEAD_SIZE * HEAD_SIZE + place;
    state[i] = args.boundary == nullptr ? 0.0f : args.boundary[of_head];
    added[i] = args.states[slot * HEAD_SIZE * HEAD_SIZE + place];
  }
  for (int step = 1; step < count; step++) {
    segment += BACKWARD ? -1 : 1;
    const int64_t next = args.segments.slot(problem, sequence, head, segment);
#pragma unroll
    for (int i = 0; i < JOINED; i++) {
      const int element = begin + i * THREADS;
      float& entering = args.states[next * HEAD_SIZE * HEAD_SIZE + element];
      state[i] = args.decays[slot * HEAD_SIZE + element / HEAD_SIZE] * state[i] + added[i];
      added[i] = entering;  // of the last segment it is undefined, and unused
      entering = state[i];
    }
    slot = next;
  }
}

}  // namespace wkv6

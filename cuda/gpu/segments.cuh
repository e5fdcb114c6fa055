// Few heads leave most of the GPU idle, so their sequences are cut into segments that run side by
// side. The state that enters a segment is needed first, and it is linear in the one before:
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
  const Work work(problem, args.segments, blockIdx.x);
  if (work.length == 0 || (BACKWARD ? work.first : work.last)) return;  // nothing follows it
  SegmentShared& shared = shared_memory<SegmentShared>();
  const Lane lane;
  const int key = 16 * lane.warp;

  KeySlice state;
  float segment_decay[2] = {1.0f, 1.0f};
  const int chunks = work.chunks();
  for (int step = 0; step < chunks; step++) {
    const int64_t t0 = static_cast<int64_t>(BACKWARD ? chunks - 1 - step : step) * CHUNK;
    const int valid = valid_tokens(work, t0), blocks = used_blocks(valid);
    __syncthreads();  // all warps are done with the last chunk
    load_chunk(shared.keys, args.keys, problem, work, t0);
    load_chunk(shared.values, args.values, problem, work, t0);
    load_chunk(shared.w, args.w, problem, work, t0);
    async_commit();
    async_wait<0>();
    __syncthreads();
    for (int i = 0; i < blocks; i++) {
      const int row = (BACKWARD ? blocks - 1 - i : i) * BLOCK;
      const Leaf w = as_leaf(shared.w.load_transposed(row, key, lane));
      const DecayProducts products(decay(log_decay(w), valid - row, lane), lane);
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
  float* const result = args.states + work.slot * HEAD_SIZE * HEAD_SIZE;
  state.each(lane, [=](float& x, int n, int v) { result[n * HEAD_SIZE + v] = x; });
  if (lane.quad == 0) {
    float* const decays = args.decays + work.slot * HEAD_SIZE + key + lane.row;
    decays[0] = segment_decay[0];
    decays[8] = segment_decay[1];
  }
}

// Replaces what each segment adds by the state that enters it. A thread does one element of one
// head of one sequence; a block does THREADS of them.
template <bool BACKWARD>
__global__ void __launch_bounds__(THREADS) join_kernel(SegmentArgs args) {
  constexpr int64_t BLOCKS_PER_STATE = HEAD_SIZE * HEAD_SIZE / THREADS;
  const Wkv6Problem& problem = args.problem;
  const int64_t head = blockIdx.x / BLOCKS_PER_STATE;  // of all sequences
  const int64_t element = blockIdx.x % BLOCKS_PER_STATE * THREADS + threadIdx.x;
  const int64_t first_slot =
      head / problem.H * args.segments.per_sequence * problem.H + head % problem.H;

  const Work sequence(problem, UNCUT, head);
  const int64_t used = (sequence.length + args.segments.length - 1) / args.segments.length;
  const int64_t count = used > 1 ? used : 1;
  float state =
      args.boundary == nullptr ? 0.0f : args.boundary[head * HEAD_SIZE * HEAD_SIZE + element];
  for (int64_t step = 0; step < count; step++) {
    const int64_t segment = BACKWARD ? count - 1 - step : step;
    const int64_t slot = first_slot + segment * problem.H;
    float& entering = args.states[slot * HEAD_SIZE * HEAD_SIZE + element];
    const float added = entering;
    entering = state;
    if (step + 1 < count)
      state = args.decays[slot * HEAD_SIZE + element / HEAD_SIZE] * state + added;
  }
}

}  // namespace wkv6

// The backward of the scan of WKV7 (wkv7_scan.cuh).
//
// With G_t the gradient of S_t, dy_t r_t^T included, from the last token to the first:
//   by values   dv = G k,  G b                               G <- G diag(d) + (G b) a^T
//   by keys     dr = S_t^T dy,  dk = G^T v,  db = G^T (S_{t-1} a),  da = S_{t-1}^T (G b),
//               dd = sum over values of S_{t-1} G            and the same step of G
#pragma once

#include "wkv7_scan.cuh"

namespace wkv7 {

template <typename T>
struct BackwardArgs {
  Wkv6Problem problem;
  const T* rows[INPUT_ROWS + 1];  // the last is dy
  const float *dstate_out, *checkpoints;
  T* gradients[INPUT_ROWS];
  float *dstate_in, *scratch;
  int64_t blocks;  // each with a scratch of its own; heads beyond take turns
};

// The temporary memory of a thread block, in floats: the states before the steps of a chunk after
// its first, and those before the tokens of a step, by keys, each element its thread's own.
template <int ELEMENTS>
struct Scratch {
  float *step_states, *token_states;
  int64_t matrix;

  static __host__ __device__ int64_t size(int64_t n, int threads) {
    return (STEPS - 1) * n * n + static_cast<int64_t>(STEP) * ELEMENTS * threads;
  }
  __device__ Scratch(float* memory, int64_t n, int threads)
      : step_states(memory + blockIdx.x * size(n, threads)),
        token_states(step_states + (STEPS - 1) * n * n),
        matrix(n * n) {}

  // Before step > 0.
  __device__ float* of_step(int step) const { return step_states + (step - 1) * matrix; }
  __device__ float& of_token(int i, int c) const {
    return token_states[(i * ELEMENTS + c) * blockDim.x + threadIdx.x];
  }
};

// By values: REMOVED of the tokens, and S after the last of them.
template <int ELEMENTS>
__device__ void remove(const Place<ELEMENTS>& place, Tokens& tokens, int count, Part<ELEMENTS>& S) {
  for (int i = 0; i < count; i++) {
    const float removed = S.advance(place, tokens, i);
    if (place.leads()) tokens.at[REMOVED][i][place.row] = removed;
  }
}

// By values, from the last token to the first: PASSED of the tokens and dv.
template <typename T, int ELEMENTS>
__device__ void pass_back(const BackwardArgs<T>& args, const Work& work, int64_t t0,
                          const Place<ELEMENTS>& place, Tokens& tokens, int count,
                          Part<ELEMENTS>& G) {
  for (int i = count - 1; i >= 0; i--) {
    const float dy = tokens.at[DY][i][place.row];
#pragma unroll
    for (int c = 0; c < ELEMENTS; c++) G.at[c] += dy * tokens.at[R][i][place.element(c)];
    const float dv = G.dot(place, tokens.at[K][i]), passed = G.dot(place, tokens.at[B][i]);
    if (place.leads()) {
      tokens.at[PASSED][i][place.row] = passed;
      args.gradients[V][work.token_offset(args.problem, t0 + i) + place.row] = from_float<T>(dv);
    }
#pragma unroll
    for (int c = 0; c < ELEMENTS; c++) {
      const int key = place.element(c);
      G.at[c] = G.at[c] * tokens.at[DECAY][i][key] + passed * tokens.at[A][i][key];
    }
  }
}

// By keys: the states before each token of a step go to memory; S is left after the last.
template <int ELEMENTS>
__device__ void save_token_states(const Scratch<ELEMENTS>& scratch, const Place<ELEMENTS>& place,
                                  const Tokens& tokens, int count, Part<ELEMENTS>& S) {
  for (int i = 0; i < count; i++) {
    const float d = tokens.at[DECAY][i][place.row], b = tokens.at[B][i][place.row];
    const float k = tokens.at[K][i][place.row];
#pragma unroll
    for (int c = 0; c < ELEMENTS; c++) {
      const int value = place.element(c);
      scratch.of_token(i, c) = S.at[c];
      S.at[c] = S.at[c] * d + tokens.at[REMOVED][i][value] * b + tokens.at[V][i][value] * k;
    }
  }
}

// By keys, from the last token to the first: the other gradients. S is the state after the last.
template <typename T, int ELEMENTS>
__device__ void gather(const BackwardArgs<T>& args, const Work& work, int64_t t0,
                       const Scratch<ELEMENTS>& scratch, const Place<ELEMENTS>& place,
                       const Tokens& tokens, int count, Part<ELEMENTS>& S, Part<ELEMENTS>& G) {
  for (int i = count - 1; i >= 0; i--) {
    const float r = tokens.at[R][i][place.row], d = tokens.at[DECAY][i][place.row];
    const float a = tokens.at[A][i][place.row];
    float dr = 0.0f, dk = 0.0f, dd = 0.0f, da = 0.0f, db = 0.0f;
#pragma unroll
    for (int c = 0; c < ELEMENTS; c++) {
      const int value = place.element(c);
      const float dy = tokens.at[DY][i][value], passed = tokens.at[PASSED][i][value];
      const float before = scratch.of_token(i, c), g = G.at[c] + dy * r;
      dr += S.at[c] * dy;
      dk += g * tokens.at[V][i][value];
      db += g * tokens.at[REMOVED][i][value];
      da += before * passed;
      dd += before * g;
      S.at[c] = before;
      G.at[c] = g * d + passed * a;
    }
    dr = place.sum(dr), dk = place.sum(dk), dd = place.sum(dd);
    da = place.sum(da), db = place.sum(db);
    if (!place.leads()) continue;
    const int64_t at = work.token_offset(args.problem, t0 + i) + place.row;
    args.gradients[R][at] = from_float<T>(dr);
    args.gradients[K][at] = from_float<T>(dk);
    args.gradients[DECAY][at] =
        from_float<T>(dd * d * log_decay_of(to_float(args.rows[DECAY][at])));
    args.gradients[A][at] = from_float<T>(da);
    args.gradients[B][at] = from_float<T>(db);
  }
}

// One head of one sequence.
template <typename T, int ELEMENTS>
__device__ void backward_head(const BackwardArgs<T>& args, const Work& work,
                              const Place<ELEMENTS>& place, const Scratch<ELEMENTS>& scratch,
                              Tokens& tokens) {
  const Wkv6Problem& problem = args.problem;
  const int64_t matrix = problem.N * problem.N, state = work.state_index(problem) * matrix;
  const float* const dstate = args.dstate_out == nullptr ? nullptr : args.dstate_out + state;
  Part<ELEMENTS> S, by_values, by_keys;  // the last two are G
  by_values.load(place, dstate);
  by_keys.load(place, dstate, true);
  for (int chunk = work.chunks() - 1; chunk >= 0; chunk--) {
    const int first = chunk * CHUNK, length = smaller(CHUNK, work.length - first);
    const int steps = (length + STEP - 1) / STEP;
    const float* const checkpoint =
        args.checkpoints + work.checkpoint_index(problem, chunk) * matrix;
    S.load(place, checkpoint);
    for (int step = 1; step < steps; step++) {
      tokens.load(args.rows, INPUT_ROWS, problem, work, first + (step - 1) * STEP, STEP);
      for (int i = 0; i < STEP; i++) S.advance(place, tokens, i);
      S.store(place, scratch.of_step(step));
    }
    for (int step = steps - 1; step >= 0; step--) {
      const int t0 = first + step * STEP, count = smaller(STEP, length - step * STEP);
      const float* const before = step == 0 ? checkpoint : scratch.of_step(step);
      tokens.load(args.rows, INPUT_ROWS + 1, problem, work, t0, count);
      S.load(place, before);
      remove(place, tokens, count, S);
      pass_back(args, work, t0, place, tokens, count, by_values);
      __syncthreads();
      S.load(place, before, true);
      save_token_states(scratch, place, tokens, count, S);
      gather(args, work, t0, scratch, place, tokens, count, S, by_keys);
    }
  }
  if (args.dstate_in != nullptr) by_values.store(place, args.dstate_in + state);
}

template <typename T, int ELEMENTS>
__global__ void __launch_bounds__(Place<ELEMENTS>::MOST_THREADS)
    scan_backward_kernel(BackwardArgs<T> args) {
  const Wkv6Problem& problem = args.problem;
  const Place<ELEMENTS> place(problem.N);
  const Scratch<ELEMENTS> scratch(args.scratch, problem.N, blockDim.x);
  Tokens& tokens = finchtune::shared_memory<Tokens>();
  tokens.clear();
  for (int64_t head = blockIdx.x; head < problem.n_seq * problem.H; head += args.blocks) {
    const Work work(problem, wkv6::uncut_segments(problem), head);
    backward_head(args, work, place, scratch, tokens);
  }
}

}  // namespace wkv7

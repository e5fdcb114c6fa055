// The scan of WKV7: the recurrence itself in fp32, for every head size, dtype and length. What its
// forward and its backward share.
//
// A thread block does one head of one sequence. Several threads share a row of a matrix, so that
// all of it lies in registers: by values, a row for each, where sums over the keys are made, or by
// keys, a row for each, where sums over the values are made. Neither needs the other's rows: what a
// token removed (S a) and passed back (G b) goes from one to the other through shared memory.
#pragma once

#include "scan.cuh"

namespace wkv7 {

using finchtune::from_float;
using finchtune::to_float;
using wkv6::CHUNK;
using wkv6::log_decay_of;
using wkv6::STEP;
using wkv6::STEPS;
using wkv6::Work;

constexpr int MAX_HEAD_SIZE = 128;

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }

// Rows of tokens in shared memory: the inputs, dy, S a and G b.
enum TokenRow { R, K, V, DECAY, A, B, DY, REMOVED, PASSED, TOKEN_ROWS };
constexpr int INPUT_ROWS = B + 1;

struct Tokens {
  float at[TOKEN_ROWS][STEP][MAX_HEAD_SIZE];  // channels beyond the head's hold zeros

  __device__ void clear() {
    for (int i = threadIdx.x; i < TOKEN_ROWS * STEP * MAX_HEAD_SIZE; i += blockDim.x)
      (&at[0][0][0])[i] = 0.0f;
  }

  // `rows` rows of `count` tokens from t0 on; w becomes the decay.
  template <typename T>
  __device__ void load(const T* const* tensors, int rows, const Wkv6Problem& problem,
                       const Work& work, int64_t t0, int count) {
    const int n = static_cast<int>(problem.N);
    __syncthreads();  // the last tokens are no longer read
    for (int index = threadIdx.x; index < count * n; index += blockDim.x) {
      const int i = index / n, channel = index % n;
      const int64_t offset = work.token_offset(problem, t0 + i) + channel;
      for (int row = 0; row < rows; row++) {
        const float x = to_float(tensors[row][offset]);
        at[row][i][channel] = row == DECAY ? expf(log_decay_of(x)) : x;
      }
    }
    __syncthreads();
  }
};

// The elements of a row that a thread owns: lane, lane + lanes, lane + 2 lanes, ...
template <int ELEMENTS>
struct Place {
  // Four threads share a row of the largest matrix.
  static constexpr int MOST_THREADS = 4 * ELEMENTS * 4;

  int n, lanes, row, lane;

  static __host__ __device__ int lanes_for(int n) {
    int lanes = 1;
    while (lanes * ELEMENTS < n) lanes *= 2;
    return lanes;
  }
  static int threads_for(int n) { return (n * lanes_for(n) + 31) / 32 * 32; }

  __device__ explicit Place(int64_t head_size)
      : n(static_cast<int>(head_size)),
        lanes(lanes_for(n)),
        row(threadIdx.x / lanes),
        lane(threadIdx.x % lanes) {}

  __device__ int element(int c) const { return c * lanes + lane; }
  __device__ bool owns(int c) const { return row < n && element(c) < n; }
  __device__ bool leads() const { return lane == 0 && row < n; }

  __device__ float sum(float x) const {
    for (int distance = 1; distance < lanes; distance *= 2)
      x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
  }
};

// A thread's part of a row.
template <int ELEMENTS>
struct Part {
  float at[ELEMENTS];

  // From or to a dense matrix: its row, or its column.
  __device__ void load(const Place<ELEMENTS>& place, const float* matrix, bool column = false) {
#pragma unroll
    for (int c = 0; c < ELEMENTS; c++) {
      const int i = column ? place.element(c) : place.row,
                j = column ? place.row : place.element(c);
      at[c] = matrix != nullptr && place.owns(c) ? matrix[i * place.n + j] : 0.0f;
    }
  }
  __device__ void store(const Place<ELEMENTS>& place, float* matrix) const {
#pragma unroll
    for (int c = 0; c < ELEMENTS; c++)
      if (place.owns(c)) matrix[place.row * place.n + place.element(c)] = at[c];
  }

  // The product with a row of a token, complete in each of the threads that share it.
  __device__ float dot(const Place<ELEMENTS>& place, const float* token) const {
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < ELEMENTS; c++) sum += at[c] * token[place.element(c)];
    return place.sum(sum);
  }

  // Of S by values: from before token i to after it. Returns S a.
  __device__ float advance(const Place<ELEMENTS>& place, const Tokens& tokens, int i) {
    const float removed = dot(place, tokens.at[A][i]), v = tokens.at[V][i][place.row];
#pragma unroll
    for (int c = 0; c < ELEMENTS; c++) {
      const int key = place.element(c);
      at[c] = at[c] * tokens.at[DECAY][i][key] + removed * tokens.at[B][i][key] +
              v * tokens.at[K][i][key];
    }
    return removed;
  }
};

}  // namespace wkv7

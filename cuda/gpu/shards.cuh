// Bone's and Bat's shards: a token's row is cut into shards of r channels.
#pragma once

#include "vectors.cuh"

namespace finchtune {

// A thread block does a row: its threads are as many parts of the shards as fit, each of as many
// columns of V channels as a shard has.
template <typename T, typename S>
struct ShardsArgs {
  int64_t rows, k, r;
  const T *x, *u;  // x (rows, k); u (shards, rows, r) or NULL: x itself is summed
  T* moved;        // x + u, or NULL
  S* sums;         // (rows, r)
};

template <typename T, typename S, int V>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS) shard_sums_kernel(ShardsArgs<T, S> args) {
  float (&parts)[ELEMENTWISE_THREADS][V] = shared_memory<float[ELEMENTWISE_THREADS][V]>();
  const int64_t row = blockIdx.x, count = (args.k + args.r - 1) / args.r;
  const int columns = static_cast<int>(args.r / V), thread = threadIdx.x;
  const int n_parts = columns < ELEMENTWISE_THREADS ? ELEMENTWISE_THREADS / columns : 1;
  const int width = columns < ELEMENTWISE_THREADS ? columns : ELEMENTWISE_THREADS;
  for (int base = 0; base < columns; base += width) {
    const int column = base + thread % width, part = thread / width;
    const int64_t at = static_cast<int64_t>(column) * V;
    Floats<V> sum = {};
    for (int64_t shard = part; part < n_parts && column < columns && shard < count;
         shard += n_parts) {
      const int64_t channel = shard * args.r + at, place = row * args.k + channel;
      if (channel >= args.k) break;
      Floats<V> x = load<V>(args.x + place);
      Floats<V> own = x;
      if (args.u != nullptr) own = load<V>(args.u + (shard * args.rows + row) * args.r + at);
      sum.each([&](float& s, int i) { s += own.x[i]; });
      if (args.moved != nullptr) {
        x.each([&](float& m, int i) { m += own.x[i]; });
        store<V>(args.moved + place, x);
      }
    }
    sum.each([&](float s, int i) { parts[thread][i] = s; });
    __syncthreads();
    if (part == 0 && column < columns) {
      for (int other = 1; other < n_parts; other++)
        sum.each([&](float& s, int i) { s += parts[other * width + thread][i]; });
      store<V>(args.sums + row * args.r + at, sum);
    }
    __syncthreads();
  }
}

template <typename T, typename S>
struct SpreadArgs {
  Stripes stripes;
  int64_t rows, k, r;
  const T* x;
  const S* s;   // (rows, r)
  T* result;    // like x, or (shards, rows, r)
  bool gather;  // which of them
};

// x + s on every shard.
template <typename T, typename S, int V>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS) spread_kernel(SpreadArgs<T, S> args) {
  if (args.stripes.column() >= args.stripes.n_columns) return;
  const int64_t row = args.stripes.first(), channel = args.stripes.column() * V;
  const int64_t place = row * args.k + channel;
  const int64_t shard = channel / args.r, inside = channel % args.r;
  const Floats<V> s = load<V>(args.s + row * args.r + inside);
  Floats<V> x = load<V>(args.x + place);
  x.each([&](float& sum, int i) { sum += s.x[i]; });
  store<V>(args.result + (args.gather ? (shard * args.rows + row) * args.r + inside : place), x);
}

}  // namespace finchtune

// Token shift and the blends that it feeds.
#pragma once

#include "vectors.cuh"

namespace finchtune {

// Rows of a stripe whose gradients of maa one thread adds up.
constexpr int64_t MIX_STRIPE = 32;

// Where a token stands in its sequence.
struct Position {
  int64_t sequence;
  bool first, last;

  __device__ Position(const Shift& shift, int64_t row) {
    if (shift.cu_seqlens == nullptr) {
      sequence = row / shift.length;
      first = row % shift.length == 0;
      last = (row + 1) % shift.length == 0;
      return;
    }
    int64_t low = 0, high = shift.n_seq - 1;  // the last sequence that begins at or before the row
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (shift.cu_seqlens[middle] <= row)
        low = middle;
      else
        high = middle - 1;
    }
    sequence = low;
    first = shift.cu_seqlens[low] == row;
    last = shift.cu_seqlens[low + 1] == row + 1;
  }
};

template <typename T>
struct TokenMixArgs {
  Shift shift;
  Stripes stripes;
  int n;
  const T *x, *before, *maa;
  bool has_blends;
  const T *blends[MOST_MIXTURES], *dout[MOST_MIXTURES];
  T* out[MOST_MIXTURES];  // backward: the gradients of the blends
  T *sum, *blended;
  float* dmaa;  // (stripes, n, channels)
};

// The token before row `row`, less it.
template <int V, typename T>
__device__ __forceinline__ Floats<V> difference(const TokenMixArgs<T>& args, int64_t row, int at,
                                                const Floats<V>& x) {
  const Position position(args.shift, row);
  const int64_t C = args.shift.channels;
  Floats<V> found = {};
  if (!position.first)
    found = load<V>(args.x + (row - 1) * C + at);
  else if (args.before != nullptr)
    found = load<V>(args.before + position.sequence * C + at);
  found.each([&](float& p, int i) { p -= x.x[i]; });
  return found;
}

// maa_j + blend_j.
template <int V, typename T>
__device__ __forceinline__ Floats<V> blend(const TokenMixArgs<T>& args, int j, int64_t row,
                                           int at) {
  const int64_t C = args.shift.channels;
  Floats<V> found = load<V>(args.maa + j * C + at);
  if (args.has_blends) {
    const Floats<V> own = load<V>(args.blends[j] + row * C + at);
    found.each([&](float& m, int i) { m += own.x[i]; });
  }
  return found;
}

template <typename T, int V>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS) token_mix_kernel(TokenMixArgs<T> args) {
  if (args.stripes.column() >= args.stripes.n_columns) return;
  const int64_t row = args.stripes.first(), C = args.shift.channels;
  const int at = args.stripes.column() * V;
  const Floats<V> x = load<V>(args.x + row * C + at), xx = difference(args, row, at, x);
#pragma unroll
  for (int j = 0; j < MOST_MIXTURES; j++) {
    if (j >= args.n) break;
    Floats<V> y = blend<V>(args, j, row, at);
    y.each([&](float& m, int i) { m = x.x[i] + xx.x[i] * m; });
    store<V>(args.out[j] + row * C + at, y);
  }
}

template <typename T, int V, bool OF_MAA>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    token_mix_backward_kernel(TokenMixArgs<T> args) {
  if (args.stripes.column() >= args.stripes.n_columns) return;
  const int64_t C = args.shift.channels;
  const int at = args.stripes.column() * V;
  Floats<V> dmaa[OF_MAA ? MOST_MIXTURES : 1] = {};
  for (int64_t row = args.stripes.first(); row < args.stripes.last(); row++) {
    Floats<V> xx = {}, sum = {}, blended = {};
    if (OF_MAA || args.has_blends) xx = difference(args, row, at, load<V>(args.x + row * C + at));
#pragma unroll
    for (int j = 0; j < MOST_MIXTURES; j++) {
      if (j >= args.n) break;
      const Floats<V> dout = load<V>(args.dout[j] + row * C + at);
      Floats<V> weight = blend<V>(args, j, row, at);
      weight.each([&](float& m, int i) {
        sum.x[i] += dout.x[i];
        blended.x[i] += dout.x[i] * m;
        m = dout.x[i] * xx.x[i];
        if (OF_MAA) dmaa[OF_MAA ? j : 0].x[i] += m;
      });
      if (args.has_blends) store<V>(args.out[j] + row * C + at, weight);
    }
    store<V>(args.sum + row * C + at, sum);
    store<V>(args.blended + row * C + at, blended);
  }
  if (OF_MAA) {
#pragma unroll
    for (int j = 0; j < MOST_MIXTURES; j++) {
      if (j >= args.n) break;
      store<V>(args.dmaa + (args.stripes.stripe() * args.n + j) * C + at, dmaa[OF_MAA ? j : 0]);
    }
  }
}

template <typename T>
struct ShiftArgs {
  Shift shift;
  Stripes stripes;
  const T *sum, *blended, *more, *maa;
  T *dx, *dbefore;
};

// s and b of a row, as elementwise.h has them.
template <int V, typename T>
__device__ __forceinline__ void shift_sums(const ShiftArgs<T>& args, int64_t row, int at,
                                           Floats<V>& s, Floats<V>& b) {
  const int64_t place = row * args.shift.channels + at;
  s = load<V>(args.sum + place);
  b = load<V>(args.blended + place);
  if (args.more == nullptr) return;
  const Floats<V> more = load<V>(args.more + place), maa = load<V>(args.maa + at);
  s.each([&](float& x, int i) {
    x += more.x[i];
    b.x[i] += more.x[i] * maa.x[i];
  });
}

template <typename T, int V>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS) shift_backward_kernel(ShiftArgs<T> args) {
  if (args.stripes.column() >= args.stripes.n_columns) return;
  const int64_t row = args.stripes.first(), C = args.shift.channels;
  const int at = args.stripes.column() * V;
  const Position position(args.shift, row);
  Floats<V> dx, b;
  shift_sums(args, row, at, dx, b);
  dx.each([&](float& x, int i) { x -= b.x[i]; });
  if (!position.last) {
    Floats<V> unused, after;
    shift_sums(args, row + 1, at, unused, after);
    dx.each([&](float& x, int i) { x += after.x[i]; });
  }
  store<V>(args.dx + row * C + at, dx);
  if (position.first && args.dbefore != nullptr)
    store<V>(args.dbefore + position.sequence * C + at, b);
}

}  // namespace finchtune

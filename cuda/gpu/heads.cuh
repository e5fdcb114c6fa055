// What RWKV-7 does to a token's heads before and after WKV7.
#pragma once

#include "heads.h"
#include "vectors.cuh"

namespace finchtune {

constexpr int HEAD_UNITS = ELEMENTWISE_THREADS / GROUP_LANES;  // heads of a thread block
constexpr int64_t HEAD_STRIPE = 64;  // tokens whose gradients of weights one thread adds up
constexpr int MOST_ROWS = 11, MOST_WEIGHTS = 3, MOST_RESULTS = 6;

// What the gradients of weights need of a head beside its rows.
struct alignas(16) HeadSums {
  float x[4];
};

template <typename T>
struct HeadArgs {
  int64_t tokens, heads, size;
  float eps;
  int n_rows;
  const T *rows[MOST_ROWS], *weights[MOST_WEIGHTS];
  T* out[MOST_RESULTS];
  HeadSums* sums;  // (tokens, heads); NULL if not wanted
};

// One head of one token, shared by GROUP_LANES lanes. Those beyond the last head do nothing but take
// part in the sums.
template <typename T, int V>
struct HeadOfToken {
  const HeadArgs<T>& args;
  int64_t unit, begin;  // begin: of the head in a tensor of tokens
  int channel, size;    // channel: of its first element; size: 0 beyond the last head

  __device__ __forceinline__ explicit HeadOfToken(const HeadArgs<T>& args) : args(args) {
    unit = static_cast<int64_t>(blockIdx.x) * HEAD_UNITS + threadIdx.x / GROUP_LANES;
    size = unit < args.tokens * args.heads ? static_cast<int>(args.size) : 0;
    begin = unit * args.size;
    channel = static_cast<int>(unit % args.heads * args.size);
  }

  // f(first element), for all that the lane has.
  template <typename F>
  __device__ __forceinline__ void each(F f) const {
    for (int i = threadIdx.x % GROUP_LANES * V; i < size; i += GROUP_LANES * V) f(i);
  }
  __device__ __forceinline__ Floats<V> row(int which, int i) const {
    return load<V>(args.rows[which] + begin + i);
  }
  __device__ __forceinline__ Floats<V> weight(int which, int i) const {
    return load<V>(args.weights[which] + channel + i);
  }
  __device__ __forceinline__ void set(int which, int i, const Floats<V>& x) const {
    store<V>(args.out[which] + begin + i, x);
  }
  __device__ __forceinline__ void keep(float a, float b, float c) const {
    if (args.sums != nullptr && size > 0 && threadIdx.x % GROUP_LANES == 0)
      args.sums[unit] = {a, b, c, 0.0f};
  }
};

// f(each element's number) of V.
template <int V, typename F>
__device__ __forceinline__ void for_elements(F f) {
#pragma unroll
  for (int e = 0; e < V; e++) f(e);
}

__device__ __forceinline__ float log_sigmoid(float x) {
  return fminf(x, 0.0f) - log1pf(expf(-fabsf(x)));
}

// The length of k k_k.
template <typename T, int V>
__device__ __forceinline__ float key_length(const HeadOfToken<T, V>& head) {
  float squares = 0.0f;
  head.each([&](int i) {
    const Floats<V> k = head.row(0, i), k_k = head.weight(0, i);
    for_elements<V>([&](int e) { squares += k.x[e] * k_k.x[e] * (k.x[e] * k_k.x[e]); });
  });
  return sqrtf(lanes_sum(squares));
}

template <typename T, int V>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS) wkv7_inputs_kernel(HeadArgs<T> args) {
  const HeadOfToken<T, V> head(args);
  const float scale = 1.0f / fmaxf(key_length(head), args.eps);
  head.each([&](int i) {
    const Floats<V> k = head.row(0, i), rate = head.row(1, i);
    const Floats<V> k_k = head.weight(0, i), k_a = head.weight(1, i);
    Floats<V> key, a, b, w = head.row(2, i);
    for_elements<V>([&](int e) {
      const float s = sigmoid(rate.x[e]), unit = k.x[e] * k_k.x[e] * scale;
      key.x[e] = k.x[e] * (1.0f + (s - 1.0f) * k_a.x[e]);
      a.x[e] = -unit;
      b.x[e] = unit * s;
      w.x[e] = log_sigmoid(w.x[e]) - 0.5f;
    });
    head.set(0, i, key);
    head.set(1, i, w);
    head.set(2, i, a);
    head.set(3, i, b);
    if (args.n_rows == 3) return;
    const Floats<V> first = head.row(4, i), mix = head.row(5, i);
    Floats<V> v = head.row(3, i);
    v.each([&](float& x, int e) { x += (first.x[e] - x) * sigmoid(mix.x[e]); });
    head.set(4, i, v);
  });
}

template <typename T, int V>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    wkv7_inputs_backward_kernel(HeadArgs<T> args) {
  const HeadOfToken<T, V> head(args);
  const float length = key_length(head), scale = 1.0f / fmaxf(length, args.eps);
  float along = 0.0f;  // of kk and its gradient
  head.each([&](int i) {
    const Floats<V> k = head.row(0, i), rate = head.row(1, i), k_k = head.weight(0, i);
    const Floats<V> da = head.row(5, i), db = head.row(6, i);
    for_elements<V>([&](int e) {
      along += (db.x[e] * sigmoid(rate.x[e]) - da.x[e]) * (k.x[e] * k_k.x[e] * scale);
    });
  });
  along = lanes_sum(along);
  if (length <= args.eps) along = 0.0f;  // kk is then no unit vector, but k k_k / eps
  head.keep(scale, along, 0.0f);
  head.each([&](int i) {
    const Floats<V> rate = head.row(1, i), k_k = head.weight(0, i), k_a = head.weight(1, i);
    const Floats<V> dkey = head.row(3, i), da = head.row(5, i), db = head.row(6, i);
    Floats<V> k = head.row(0, i), drate;
    for_elements<V>([&](int e) {
      const float s = sigmoid(rate.x[e]), unit = k.x[e] * k_k.x[e] * scale;
      const float dscaled = (db.x[e] * s - da.x[e] - unit * along) * scale;
      drate.x[e] = (unit * db.x[e] + dkey.x[e] * k.x[e] * k_a.x[e]) * s * (1.0f - s);
      k.x[e] = dkey.x[e] * (1.0f + (s - 1.0f) * k_a.x[e]) + dscaled * k_k.x[e];
    });
    head.set(0, i, k);
    head.set(1, i, drate);
    const Floats<V> decay = head.row(2, i);
    Floats<V> dw = head.row(4, i);
    dw.each([&](float& d, int e) { d *= sigmoid(-decay.x[e]); });
    head.set(2, i, dw);
    if (args.n_rows == 7) return;
    const Floats<V> v = head.row(7, i), first = head.row(8, i), mix = head.row(9, i);
    Floats<V> dv = head.row(10, i), dfirst, dmix;
    for_elements<V>([&](int e) {
      const float open = sigmoid(mix.x[e]);
      dfirst.x[e] = dv.x[e] * open;
      dmix.x[e] = dv.x[e] * (first.x[e] - v.x[e]) * open * (1.0f - open);
      dv.x[e] *= 1.0f - open;
    });
    head.set(3, i, dv);
    head.set(4, i, dfirst);
    head.set(5, i, dmix);
  });
}

// Mean and 1 / standard deviation of y over a head, and the sum of r k r_k.
struct BonusMoments {
  float mean, scale, bonus;

  template <typename T, int V>
  __device__ __forceinline__ explicit BonusMoments(const HeadOfToken<T, V>& head) {
    float sum = 0.0f, squares = 0.0f, product = 0.0f;
    head.each([&](int i) {
      const Floats<V> y = head.row(0, i), r = head.row(1, i), k = head.row(2, i);
      const Floats<V> r_k = head.weight(2, i);
      for_elements<V>([&](int e) {
        sum += y.x[e];
        product += r.x[e] * k.x[e] * r_k.x[e];
      });
    });
    bonus = lanes_sum(product);
    mean = lanes_sum(sum) / head.args.size;
    head.each([&](int i) {
      head.row(0, i).each([&](float y, int) { squares += (y - mean) * (y - mean); });
    });
    scale = rsqrtf(lanes_sum(squares) / head.args.size + head.args.eps);
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS) bonus_norm_kernel(HeadArgs<T> args) {
  const HeadOfToken<T, V> head(args);
  const BonusMoments of(head);
  head.each([&](int i) {
    const Floats<V> v = head.row(3, i), gate = head.row(4, i);
    const Floats<V> weight = head.weight(0, i), bias = head.weight(1, i);
    Floats<V> y = head.row(0, i);
    y.each([&](float& x, int e) {
      const float normal = (x - of.mean) * of.scale;
      x = (normal * weight.x[e] + bias.x[e] + of.bonus * v.x[e]) * gate.x[e];
    });
    head.set(0, i, y);
  });
}

template <typename T, int V>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    bonus_norm_backward_kernel(HeadArgs<T> args) {
  const HeadOfToken<T, V> head(args);
  const BonusMoments of(head);
  float sum = 0.0f, along = 0.0f, dbonus = 0.0f;
  head.each([&](int i) {
    const Floats<V> y = head.row(0, i), v = head.row(3, i), gate = head.row(4, i);
    const Floats<V> dout = head.row(5, i), weight = head.weight(0, i), bias = head.weight(1, i);
    Floats<V> dv, dgate;
    for_elements<V>([&](int e) {
      const float normal = (y.x[e] - of.mean) * of.scale, d = dout.x[e] * gate.x[e];
      sum += d * weight.x[e];
      along += d * weight.x[e] * normal;
      dbonus += d * v.x[e];
      dv.x[e] = d * of.bonus;
      dgate.x[e] = dout.x[e] * (normal * weight.x[e] + bias.x[e] + of.bonus * v.x[e]);
    });
    head.set(3, i, dv);
    head.set(4, i, dgate);
  });
  sum = lanes_sum(sum) / args.size;
  along = lanes_sum(along) / args.size;
  dbonus = lanes_sum(dbonus);
  head.keep(of.mean, of.scale, dbonus);
  head.each([&](int i) {
    const Floats<V> gate = head.row(4, i), dout = head.row(5, i), weight = head.weight(0, i);
    Floats<V> y = head.row(0, i);
    y.each([&](float& x, int e) {
      const float normal = (x - of.mean) * of.scale;
      x = of.scale * (dout.x[e] * gate.x[e] * weight.x[e] - sum - normal * along);
    });
    head.set(0, i, y);
    const Floats<V> r_k = head.weight(2, i);
    Floats<V> r = head.row(1, i), k = head.row(2, i);
    for_elements<V>([&](int e) {
      const float dr = dbonus * k.x[e] * r_k.x[e];
      k.x[e] = dbonus * r.x[e] * r_k.x[e];
      r.x[e] = dr;
    });
    head.set(1, i, r);
    head.set(2, i, k);
  });
}

// One channel of one token, for the gradients of weights.
template <typename T>
struct Channel {
  const HeadArgs<T>& args;
  int64_t at;
  HeadSums sums;
  __device__ __forceinline__ float operator[](int which) const {
    return to_float(args.rows[which][at]);
  }
};

struct Wkv7InputsWeights {
  static constexpr int COUNT = 2;
  template <typename T>
  static __device__ __forceinline__ void add(const Channel<T>& x, float k_k, float* sums) {
    const float scale = x.sums.x[0], along = x.sums.x[1], k = x[0], s = sigmoid(x[1]);
    sums[0] += (x[6] * s - x[5] - k * k_k * scale * along) * scale * k;
    sums[1] += x[3] * k * (s - 1.0f);
  }
};

struct BonusNormWeights {
  static constexpr int COUNT = 3;
  template <typename T>
  static __device__ __forceinline__ void add(const Channel<T>& x, float, float* sums) {
    const float d = x[5] * x[4];
    sums[0] += d * ((x[0] - x.sums.x[0]) * x.sums.x[1]);
    sums[1] += d;
    sums[2] += x.sums.x[2] * x[1] * x[2];
  }
};

template <typename T>
struct HeadWeightArgs {
  HeadArgs<T> heads;
  Stripes stripes;
  float* parts;  // (stripes, weights, channels)
};

template <typename T, typename Weights>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS) head_weights_kernel(HeadWeightArgs<T> args) {
  const HeadArgs<T>& heads = args.heads;
  const int channel = args.stripes.column();
  if (channel >= args.stripes.n_columns) return;
  const int64_t C = heads.heads * heads.size;
  const HeadSums* const of_head = heads.sums + channel / static_cast<int>(heads.size);
  const float weight = to_float(heads.weights[0][channel]);
  float sums[Weights::COUNT] = {};
  for (int64_t token = args.stripes.first(); token < args.stripes.last(); token++)
    Weights::add(Channel<T>{heads, token * C + channel, of_head[token * heads.heads]}, weight,
                 sums);
#pragma unroll
  for (int i = 0; i < Weights::COUNT; i++)
    args.parts[(args.stripes.stripe() * Weights::COUNT + i) * C + channel] = sums[i];
}

}  // namespace finchtune

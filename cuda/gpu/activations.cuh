// Norms, gates and activations.
#pragma once

#include "vectors.cuh"

namespace finchtune {

constexpr int NORM_UNITS = ELEMENTWISE_THREADS / GROUP_LANES;
constexpr int64_t NORM_STRIPE = 64;  // rows whose gradients of weight and bias one thread adds up

template <typename T>
struct GatedNormArgs {
  int64_t rows, groups, size;
  float eps;
  const T *y, *gate, *weight, *bias, *dout;
  T *out, *dy, *dgate;
  float2* moments;  // (rows, groups): mean and 1 / standard deviation; NULL if not wanted
};

// One group of one token, shared by GROUP_LANES lanes. Those beyond the last group do nothing but
// take part in the sums.
template <typename T, int V>
struct GroupOfToken {
  int64_t begin;  // of the group in a tensor of tokens
  int channel;    // of its first element
  int size;       // 0 beyond the last
  int64_t unit;
  float mean, scale;

  __device__ __forceinline__ explicit GroupOfToken(const GatedNormArgs<T>& args) {
    unit = static_cast<int64_t>(blockIdx.x) * NORM_UNITS + threadIdx.x / GROUP_LANES;
    size = unit < args.rows * args.groups ? static_cast<int>(args.size) : 0;
    begin = unit * args.size;
    channel = static_cast<int>(unit % args.groups * args.size);
    float sum = 0.0f, squares = 0.0f;
    each([&](int i) { load<V>(args.y + begin + i).each([&](float y, int) { sum += y; }); });
    mean = lanes_sum(sum) / args.size;
    each([&](int i) {
      load<V>(args.y + begin + i).each([&](float y, int) { squares += (y - mean) * (y - mean); });
    });
    scale = rsqrtf(lanes_sum(squares) / args.size + args.eps);
  }

  // f(first element), for all that the lane has.
  template <typename F>
  __device__ __forceinline__ void each(F f) const {
    for (int i = threadIdx.x % GROUP_LANES * V; i < size; i += GROUP_LANES * V) f(i);
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS) gated_norm_kernel(GatedNormArgs<T> args) {
  const GroupOfToken<T, V> group(args);
  group.each([&](int i) {
    const Floats<V> gate = load<V>(args.gate + group.begin + i);
    const Floats<V> weight = load<V>(args.weight + group.channel + i);
    const Floats<V> bias = load<V>(args.bias + group.channel + i);
    Floats<V> y = load<V>(args.y + group.begin + i);
    y.each([&](float& x, int e) {
      const float normal = (x - group.mean) * group.scale;
      x = (normal * weight.x[e] + bias.x[e]) * (gate.x[e] * sigmoid(gate.x[e]));
    });
    store<V>(args.out + group.begin + i, y);
  });
}

// For one element: its normal value, the gradient of that, and of the gate.
struct NormGradient {
  float normal, dnormal, dgate, dbiased;

  __device__ __forceinline__ NormGradient(float y, float gate, float weight, float bias, float dout,
                                          float mean, float scale) {
    const float open = sigmoid(gate);
    normal = (y - mean) * scale;
    dgate = dout * (normal * weight + bias) * (open * (1.0f + gate * (1.0f - open)));
    dbiased = dout * gate * open;
    dnormal = dbiased * weight;
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    gated_norm_backward_kernel(GatedNormArgs<T> args) {
  const GroupOfToken<T, V> group(args);
  // f(first element, element of the vector, its gradients)
  const auto each = [&](auto f) {
    group.each([&](int i) {
      const Floats<V> gate = load<V>(args.gate + group.begin + i);
      const Floats<V> weight = load<V>(args.weight + group.channel + i);
      const Floats<V> bias = load<V>(args.bias + group.channel + i);
      const Floats<V> dout = load<V>(args.dout + group.begin + i);
      load<V>(args.y + group.begin + i).each([&](float y, int e) {
        f(i, e,
          NormGradient(y, gate.x[e], weight.x[e], bias.x[e], dout.x[e], group.mean, group.scale));
      });
    });
  };
  float sum = 0.0f, along = 0.0f;
  each([&](int, int, const NormGradient& d) {
    sum += d.dnormal;
    along += d.dnormal * d.normal;
  });
  sum = lanes_sum(sum) / args.size;
  along = lanes_sum(along) / args.size;
  Floats<V> dy, dgate;
  each([&](int i, int e, const NormGradient& d) {
    dy.x[e] = group.scale * (d.dnormal - sum - d.normal * along);
    dgate.x[e] = d.dgate;
    if (e < V - 1) return;
    store<V>(args.dy + group.begin + i, dy);
    store<V>(args.dgate + group.begin + i, dgate);
  });
  if (args.moments != nullptr && group.size > 0 && threadIdx.x % GROUP_LANES == 0)
    args.moments[group.unit] = {group.mean, group.scale};
}

template <typename T>
struct NormWeightArgs {
  GatedNormArgs<T> norm;
  Stripes stripes;
  float* parts;  // (stripes, 2, channels): of weight and bias
};

template <typename T>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS) norm_weight_kernel(NormWeightArgs<T> args) {
  const GatedNormArgs<T>& norm = args.norm;
  const int channel = args.stripes.column();
  if (channel >= args.stripes.n_columns) return;
  const int64_t C = norm.groups * norm.size;
  const float2* const moments_of = norm.moments + channel / static_cast<int>(norm.size);
  float dweight = 0.0f, dbias = 0.0f;
  for (int64_t row = args.stripes.first(); row < args.stripes.last(); row++) {
    const float2 moments = moments_of[row * norm.groups];
    const int64_t at = row * C + channel;
    const NormGradient d(to_float(norm.y[at]), to_float(norm.gate[at]), 1.0f, 0.0f,
                         to_float(norm.dout[at]), moments.x, moments.y);
    dweight += d.dbiased * d.normal;
    dbias += d.dbiased;
  }
  float* const parts = args.parts + args.stripes.stripe() * 2 * C;
  parts[channel] = dweight;
  parts[C + channel] = dbias;
}

// Element by element: F::of(the elements of the inputs, the results), two inputs and outputs at most.
template <typename T>
struct ElementsArgs {
  int64_t count;
  const T *a, *b, *c;
  T *first, *second;
};

struct SquaredRelu {
  static __device__ __forceinline__ void of(float x, float, float, float& y, float&) {
    const float positive = x < 0.0f ? 0.0f : x;  // NaN passes
    y = positive * positive;
  }
};
struct SquaredReluBackward {  // dy, y
  static __device__ __forceinline__ void of(float dy, float y, float, float& dx, float&) {
    dx = 2.0f * sqrtf(y) * dy;
  }
};
struct SigmoidGate {
  static __device__ __forceinline__ void of(float gate, float y, float, float& out, float&) {
    out = sigmoid(gate) * y;
  }
};
struct SigmoidGateBackward {  // dout, gate, y
  static __device__ __forceinline__ void of(float dout, float gate, float y, float& dgate,
                                            float& dy) {
    const float open = sigmoid(gate);
    dgate = dout * y * (open * (1.0f - open));
    dy = dout * open;
  }
};

template <typename T, int V, typename F>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS) elements_kernel(ElementsArgs<T> args) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * ELEMENTWISE_THREADS + threadIdx.x) * V;
  if (at >= args.count) return;
  Floats<V> b = {}, c = {}, first, second;
  if (args.b != nullptr) b = load<V>(args.b + at);
  if (args.c != nullptr) c = load<V>(args.c + at);
  load<V>(args.a + at).each([&](float a, int i) {
    F::of(a, b.x[i], c.x[i], first.x[i], second.x[i]);
  });
  store<V>(args.first + at, first);
  if (args.second != nullptr) store<V>(args.second + at, second);
}

}  // namespace finchtune

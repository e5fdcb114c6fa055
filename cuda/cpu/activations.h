// Norms, gates and activations. Part of kernels.h.

static inline float sum_of_lanes(Vec x) {
  float sum = 0;
  for (int l = 0; l < LANES; ++l) sum += x[l];
  return sum;
}

// x in its first `count` lanes, zero in the others.
static inline Vec first_lanes(Vec x, Whole) { return x; }
static inline Vec first_lanes(Vec x, int64_t count) {
  for (int64_t l = count; l < LANES; ++l) x[l] = 0;
  return x;
}

static inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exponential(at_most(80.0f, -x)).value()); }

// Mean and 1 / standard deviation of the `n` elements of y from `at` on.
template <typename E>
static inline void moments(const GatedNorm& norm, int64_t at, float* mean, float* scale) {
  const int64_t n = norm.group_size;
  Vec sum = {}, squares = {};
  for_vectors(0, n, [&](int64_t i, auto count) __attribute__((always_inline)) {
    sum += load<E>(norm.y, at + i, count);
  });
  *mean = sum_of_lanes(sum) / n;
  for_vectors(0, n, [&](int64_t i, auto count) __attribute__((always_inline)) {
    const Vec off = first_lanes(load<E>(norm.y, at + i, count) - *mean, count);
    squares += off * off;
  });
  *scale = 1.0f / std::sqrt(sum_of_lanes(squares) / n + norm.eps);
}

template <typename E>
static void gated_norm_groups(const GatedNorm& norm, void* out, int64_t first, int64_t last) {
  const int64_t n = norm.group_size;
  for (int64_t t = 0; t < norm.n_tokens; ++t)
    for (int64_t group = first; group < last; ++group) {
      const int64_t column = group * n, at = t * norm.n_groups * n + column;
      float mean, scale;
      moments<E>(norm, at, &mean, &scale);
      for_vectors(0, n, [&](int64_t i, auto count) __attribute__((always_inline)) {
        const Vec y = (load<E>(norm.y, at + i, count) - mean) * scale;
        const Vec gate = load<E>(norm.gate, at + i, count);
        const Vec weight = load<E>(norm.weight, column + i, count);
        const Vec bias = load<E>(norm.bias, column + i, count);
        store<E>(out, at + i, (y * weight + bias) * (gate * sigmoid(gate)), count);
      });
    }
}

static void gated_norm(const GatedNorm& norm, void* out, int64_t first, int64_t last) {
  with_element(norm.element,
               [&](auto e) { gated_norm_groups<decltype(e)>(norm, out, first, last); });
}

template <typename E>
static void gated_norm_backward_groups(const GatedNorm& norm, const GatedNormGradients& d,
                                       int64_t first, int64_t last) {
  const int64_t n = norm.group_size;
  if (d.weight) {
    std::fill(d.weight + first * n, d.weight + last * n, 0.0f);
    std::fill(d.bias + first * n, d.bias + last * n, 0.0f);
  }
  Scratch normal(n), through(n);  // y normalised, and the gradient of that
  for (int64_t t = 0; t < norm.n_tokens; ++t)
    for (int64_t group = first; group < last; ++group) {
      const int64_t column = group * n, at = t * norm.n_groups * n + column;
      float mean, scale;
      moments<E>(norm, at, &mean, &scale);
      Vec sum = {}, along = {};
      for_vectors(0, n, [&](int64_t i, auto count) __attribute__((always_inline)) {
        const Vec y = first_lanes((load<E>(norm.y, at + i, count) - mean) * scale, count);
        const Vec gate = load<E>(norm.gate, at + i, count), open = sigmoid(gate);
        const Vec weight = load<E>(norm.weight, column + i, count);
        const Vec dout = load<E>(d.out, at + i, count), dy = dout * (gate * open);
        const Vec scaled = y * weight + load<E>(norm.bias, column + i, count);
        store<E>(d.gate, at + i, dout * scaled * (open * (1.0f + gate * (1.0f - open))), count);
        if (d.weight) {
          float *dweight = d.weight + column, *dbias = d.bias + column;
          store<Float32>(dweight, i, load<Float32>(dweight, i, count) + dy * y, count);
          store<Float32>(dbias, i, load<Float32>(dbias, i, count) + dy, count);
        }
        const Vec dnormal = dy * weight;
        sum += dnormal;
        along += dnormal * y;
        store<Float32>(normal.data, i, y, count);
        store<Float32>(through.data, i, dnormal, count);
      });
      const float mean_of_d = sum_of_lanes(sum) / n, mean_along = sum_of_lanes(along) / n;
      for_vectors(0, n, [&](int64_t i, auto count) __attribute__((always_inline)) {
        const Vec y = load<Float32>(normal.data, i, count);
        const Vec dnormal = load<Float32>(through.data, i, count);
        store<E>(d.y, at + i, scale * (dnormal - mean_of_d - y * mean_along), count);
      });
    }
}

static void gated_norm_backward(const GatedNorm& norm, const GatedNormGradients& d, int64_t first,
                                int64_t last) {
  with_element(norm.element,
               [&](auto e) { gated_norm_backward_groups<decltype(e)>(norm, d, first, last); });
}

// The rest goes element by element, from `first` to `last`.

static void squared_relu(Element element, const void* x, void* y, int64_t first, int64_t last) {
  with_element(element, [=](auto e) __attribute__((always_inline)) {
    typedef decltype(e) E;
    for_vectors(first, last, [=](int64_t i, auto count) __attribute__((always_inline)) {
      const Vec positive = at_least(0.0f, load<E>(x, i, count));
      store<E>(y, i, positive * positive, count);
    });
  });
}

// From the result y: its root is relu(x).
static void squared_relu_backward(Element element, const void* y, const void* dy, void* dx,
                                  int64_t first, int64_t last) {
  with_element(element, [=](auto e) __attribute__((always_inline)) {
    typedef decltype(e) E;
    for_vectors(first, last, [=](int64_t i, auto count) __attribute__((always_inline)) {
      store<E>(dx, i, 2.0f * square_root(load<E>(y, i, count)) * load<E>(dy, i, count), count);
    });
  });
}

static void sigmoid_gate(Element element, const void* gate, const void* y, void* out, int64_t first,
                         int64_t last) {
  with_element(element, [=](auto e) __attribute__((always_inline)) {
    typedef decltype(e) E;
    for_vectors(first, last, [=](int64_t i, auto count) __attribute__((always_inline)) {
      const Vec open = sigmoid(load<E>(gate, i, count));
      store<E>(out, i, open * load<E>(y, i, count), count);
    });
  });
}

static void sigmoid_gate_backward(Element element, const void* gate, const void* y,
                                  const void* dout, void* dgate, void* dy, int64_t first,
                                  int64_t last) {
  with_element(element, [=](auto e) __attribute__((always_inline)) {
    typedef decltype(e) E;
    for_vectors(first, last, [=](int64_t i, auto count) __attribute__((always_inline)) {
      const Vec open = sigmoid(load<E>(gate, i, count)), d = load<E>(dout, i, count);
      store<E>(dy, i, d * open, count);
      store<E>(dgate, i, d * load<E>(y, i, count) * (open * (1.0f - open)), count);
    });
  });
}

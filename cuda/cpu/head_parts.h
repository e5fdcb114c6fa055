// The kernels of heads.h. Part of kernels.h. Calls take ranges of heads, so that a sum over tokens
// is made by one of them alone.

// A head of a token: where it lies in rows, and its channels in weights.
template <typename E>
struct HeadPart {
  const HeadParts& parts;
  int64_t at, column;

  template <typename Count>
  Vec row(int which, int64_t i, Count count) const {
    return load<E>(parts.rows[which], at + i, count);
  }
  template <typename Count>
  Vec weight(int which, int64_t i, Count count) const {
    return load<E>(parts.weights[which], column + i, count);
  }
  template <typename Count>
  void set(int which, int64_t i, Vec x, Count count) const {
    store<E>(parts.out[which], at + i, x, count);
  }
  template <typename Count>
  void add(int which, int64_t i, Vec x, Count count) const {
    if (!parts.of_weights) return;
    float* sum = parts.of_weights + which * parts.n_heads * parts.head_size + column;
    store<Float32>(sum, i, load<Float32>(sum, i, count) + x, count);
  }
  // f(i, count) for all channels; its lanes beyond count hold zeros in rows and weights.
  template <typename F>
  inline __attribute__((always_inline)) void each(F f) const {
    for_vectors(0, parts.head_size, f);
  }
};

// f(a HeadPart) for all tokens of the heads from `first` to `last`.
template <typename F>
static inline __attribute__((always_inline)) void for_heads(const HeadParts& parts, int64_t first,
                                                            int64_t last, F f) {
  with_element(parts.element, [&](auto e) __attribute__((always_inline)) {
    const int64_t n = parts.head_size;
    for (int64_t t = 0; t < parts.n_tokens; ++t)
      for (int64_t head = first; head < last; ++head)
        f(HeadPart<decltype(e)>{parts, (t * parts.n_heads + head) * n, head * n});
  });
}

static void clear_weight_gradients(const HeadParts& parts, int count, int64_t first, int64_t last) {
  const int64_t n = parts.head_size, n_channels = parts.n_heads * n;
  for (int i = 0; parts.of_weights && i < count; ++i) {
    float* sums = parts.of_weights + i * n_channels;
    std::fill(sums + first * n, sums + last * n, 0.0f);
  }
}

// log sigmoid(x) = min(x, 0) - log(1 + e), with e = exp(-|x|).
static inline Vec log_sigmoid(Vec x) {
  const Vec e = exponential(x < -x ? x : -x).value();
  // log(1 + e) = 2 artanh(e / (2 + e)): artanh(s) / s by a Chebyshev fit of degree 4 in s^2, which
  // is at most 1/9, off by 4e-9 of itself.
  const Vec s = e / (2.0f + e), square = s * s;
  Vec series = 0.140873283f * square + 0.13980709f;
  series = series * square + 0.200124264f;
  series = series * square + 0.333331585f;
  series = series * square + 1.0f;
  return at_most(0.0f, x) - 2.0f * s * series;
}

// 1 / the length of k k_k, of which no less than eps is taken; `long_enough`: it was more.
template <typename Part>
static inline float inverse_length(const Part& x, bool* long_enough) {
  Vec squares = {};
  x.each([&](int64_t i, auto count) __attribute__((always_inline)) {
    const Vec scaled = x.row(0, i, count) * x.weight(0, i, count);
    squares += scaled * scaled;
  });
  const float length = std::sqrt(sum_of_lanes(squares));
  *long_enough = length > x.parts.eps;
  return 1.0f / std::max(length, x.parts.eps);
}

// What WKV7 takes. Rows k, rate, decay and, unless v stays as it is, v, first, mix; weights k_k, k_a.
// With kk the unit vector along k k_k and s = sigmoid(rate): k (1 + (s - 1) k_a),
// w = log sigmoid(decay) - 1/2, -kk, kk s, and v + (first - v) sigmoid(mix).
static void wkv7_inputs(const HeadParts& parts, int64_t first, int64_t last) {
  const bool mixed = parts.n_rows > 3;
  for_heads(parts, first, last, [&](auto x) __attribute__((always_inline)) {
    bool long_enough;
    const float scale = inverse_length(x, &long_enough);
    x.each([&](int64_t i, auto count) __attribute__((always_inline)) {
      const Vec k = x.row(0, i, count), rate = sigmoid(x.row(1, i, count));
      const Vec unit = k * x.weight(0, i, count) * scale;
      x.set(0, i, k * (1.0f + (rate - 1.0f) * x.weight(1, i, count)), count);
      x.set(1, i, log_sigmoid(x.row(2, i, count)) - 0.5f, count);
      x.set(2, i, -unit, count);
      x.set(3, i, unit * rate, count);
      if (!mixed) return;
      const Vec v = x.row(3, i, count);
      x.set(4, i, v + (x.row(4, i, count) - v) * sigmoid(x.row(5, i, count)), count);
    });
  });
}

// Rows k, rate, decay, the gradients of the first four results and, unless v stays as it is, v, first,
// mix and the gradient of the last: the gradients of k, rate, decay, v, first, mix, of k_k and k_a.
static void wkv7_inputs_backward(const HeadParts& parts, int64_t first, int64_t last) {
  clear_weight_gradients(parts, 2, first, last);
  const bool mixed = parts.n_rows > 7;
  Scratch through(parts.head_size);  // the gradient of kk
  for_heads(parts, first, last, [&](auto x) __attribute__((always_inline)) {
    bool long_enough;
    const float scale = inverse_length(x, &long_enough);
    Vec along = {};
    x.each([&](int64_t i, auto count) __attribute__((always_inline)) {
      const Vec rate = sigmoid(x.row(1, i, count));
      const Vec d = x.row(6, i, count) * rate - x.row(5, i, count);
      along += d * (x.row(0, i, count) * x.weight(0, i, count) * scale);
      store<Float32>(through.data, i, d, count);
    });
    const float parallel = long_enough ? sum_of_lanes(along) : 0.0f;
    x.each([&](int64_t i, auto count) __attribute__((always_inline)) {
      const Vec k = x.row(0, i, count), rate = sigmoid(x.row(1, i, count));
      const Vec k_k = x.weight(0, i, count), k_a = x.weight(1, i, count);
      const Vec unit = k * k_k * scale, d = x.row(3, i, count);
      const Vec dscaled = (load<Float32>(through.data, i, count) - unit * parallel) * scale;
      const Vec drate = unit * x.row(6, i, count) + d * k * k_a;
      x.set(0, i, d * (1.0f + (rate - 1.0f) * k_a) + dscaled * k_k, count);
      x.set(1, i, drate * rate * (1.0f - rate), count);
      x.set(2, i, x.row(4, i, count) * sigmoid(-x.row(2, i, count)), count);
      x.add(0, i, dscaled * k, count);
      x.add(1, i, d * k * (rate - 1.0f), count);
      if (!mixed) return;
      const Vec open = sigmoid(x.row(9, i, count)), dv = x.row(10, i, count);
      const Vec apart = x.row(8, i, count) - x.row(7, i, count);
      x.set(3, i, dv * (1.0f - open), count);
      x.set(4, i, dv * open, count);
      x.set(5, i, dv * apart * open * (1.0f - open), count);
    });
  });
}

// What WKV7's norm makes of a head: mean and 1 / standard deviation of y, and sum_n r k r_k.
struct BonusMoments {
  float mean, scale, bonus;

  template <typename E>
  explicit BonusMoments(const HeadPart<E>& x) {
    GatedNorm norm = {};
    norm.group_size = x.parts.head_size, norm.eps = x.parts.eps, norm.y = x.parts.rows[0];
    moments<E>(norm, x.at, &mean, &scale);
    Vec sum = {};
    x.each([&](int64_t i, auto count) __attribute__((always_inline)) {
      sum += x.row(1, i, count) * x.row(2, i, count) * x.weight(2, i, count);
    });
    bonus = sum_of_lanes(sum);
  }
};

// Rows y, r, k, v, gate, weights weight, bias, r_k:
// (normalise(y) weight + bias + v sum_n r k r_k) gate, with y normalised over each head.
static void bonus_norm(const HeadParts& parts, int64_t first, int64_t last) {
  for_heads(parts, first, last, [&](auto x) __attribute__((always_inline)) {
    const BonusMoments of(x);
    x.each([&](int64_t i, auto count) __attribute__((always_inline)) {
      const Vec normal = (x.row(0, i, count) - of.mean) * of.scale;
      const Vec sum = normal * x.weight(0, i, count) + x.weight(1, i, count);
      x.set(0, i, (sum + of.bonus * x.row(3, i, count)) * x.row(4, i, count), count);
    });
  });
}

// Rows as above and the gradient of the result: those of the five rows and the three weights.
static void bonus_norm_backward(const HeadParts& parts, int64_t first, int64_t last) {
  clear_weight_gradients(parts, 3, first, last);
  Scratch normals(parts.head_size), through(parts.head_size);  // y normalised, and its gradient
  for_heads(parts, first, last, [&](auto x) __attribute__((always_inline)) {
    const BonusMoments of(x);
    Vec total = {}, along = {}, of_bonus = {};
    x.each([&](int64_t i, auto count) __attribute__((always_inline)) {
      const Vec normal = first_lanes((x.row(0, i, count) - of.mean) * of.scale, count);
      const Vec v = x.row(3, i, count), gate = x.row(4, i, count), dout = x.row(5, i, count);
      const Vec weight = x.weight(0, i, count), d = dout * gate, dnormal = d * weight;
      x.set(3, i, d * of.bonus, count);
      x.set(4, i, dout * (normal * weight + x.weight(1, i, count) + of.bonus * v), count);
      x.add(0, i, d * normal, count);
      x.add(1, i, d, count);
      total += dnormal;
      along += dnormal * normal;
      of_bonus += d * v;
      store<Float32>(normals.data, i, normal, count);
      store<Float32>(through.data, i, dnormal, count);
    });
    const float n = x.parts.head_size, mean = sum_of_lanes(total) / n;
    const float mean_along = sum_of_lanes(along) / n, dbonus = sum_of_lanes(of_bonus);
    x.each([&](int64_t i, auto count) __attribute__((always_inline)) {
      const Vec normal = load<Float32>(normals.data, i, count);
      const Vec r = x.row(1, i, count), k = x.row(2, i, count), r_k = x.weight(2, i, count);
      const Vec dnormal = load<Float32>(through.data, i, count);
      x.set(0, i, of.scale * (dnormal - mean - normal * mean_along), count);
      x.set(1, i, dbonus * k * r_k, count);
      x.set(2, i, dbonus * r * r_k, count);
      x.add(2, i, dbonus * r * k, count);
    });
  });
}

// One token of the recurrence, for decoding. Part of kernels.h.

// y = r (S + diag(u) k^T v), S' = diag(decay) S + k^T v for one head; rows of whole vectors.
static inline void step_head(const Row& r, const Row& k, const Row& v, const Row& decay,
                             float bonus, Row& y, float* S, int64_t n) {
  for_vectors(0, n, [&](int64_t m, auto count) __attribute__((always_inline)) {
    const Vec value = v.vec(m);
    Vec sum = bonus * value;
    for (int64_t p = 0; p < n; ++p) {
      const Vec before = load<Float32>(S, p * n + m, count);
      sum += r.at[p] * before;
      store<Float32>(S, p * n + m, decay.at[p] * before + k.at[p] * value, count);
    }
    y.vec(m) = sum;
  });
}

// Heads, numbered as row * n_heads + head.
static void wkv6_step(const Wkv6Step& step, int64_t first, int64_t last) {
  DenormalsAreZero while_alive;
  const int64_t n = step.head_size;
  Row r, k, v, decay, y;
  for (int64_t index = first; index < last; ++index) {
    decay = v = {};
    load_row(r.at, step.r, step.element, index * n, n);
    load_row(k.at, step.k, step.element, index * n, n);
    load_row(v.at, step.v, step.element, index * n, n);
    load_row(decay.at, step.w, step.element, index * n, n);
    const float* u = step.u + index % step.n_heads * n;
    float bonus = 0.0f;
    for (int64_t i = 0; i < n; ++i) bonus += r.at[i] * u[i] * k.at[i];
    for (int64_t i = 0; i < n; i += LANES)
      decay.vec(i) = exponential(-exponential(at_most(80.0f, decay.vec(i))).value()).value();
    step_head(r, k, v, decay, bonus, y, step.state + index * n * n, n);
    store_row(y.at, step.y, step.element, index * n, n);
  }
}

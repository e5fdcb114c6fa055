// The cross entropy of a token, and its gradient in the place of the logits. Part of
// kernels.h.

constexpr int64_t kStrip = 2048;  // floats that stay in the first-level cache
constexpr float kLowest = std::numeric_limits<float>::lowest();

// x = f(x) for n floats. In the last vector, lanes past the end are kLowest.
template <typename F>
static inline void transform(float* x, int64_t n, F f) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const Vec v = *reinterpret_cast<const UnalignedVec*>(x + i);
    *reinterpret_cast<UnalignedVec*>(x + i) = f(v);
  }
  if (i == n) return;
  Vec tail = Vec{} + kLowest;
  std::memcpy(&tail, x + i, (n - i) * sizeof(float));
  tail = f(tail);
  std::memcpy(x + i, &tail, (n - i) * sizeof(float));
}

static inline float largest_of(const float* x, int64_t n) {
  Vec lanes = Vec{} + kLowest;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const Vec v = *reinterpret_cast<const UnalignedVec*>(x + i);
    lanes = v > lanes ? v : lanes;
  }
  float largest = kLowest;
  for (int l = 0; l < LANES; ++l) largest = std::max(largest, lanes[l]);
  for (; i < n; ++i) largest = std::max(largest, x[i]);
  return largest;
}

static inline Exponential exponential(float x) { return exponential(Vec{} + x); }

// -log softmax(x)[label], and x turned into softmax(x) - [at label] + l2wrap * x [at the largest].
// Strips are taken once: each is a sum of e^(x - the largest so far), which `shifts` remembers.
static float cross_entropy_row(float* x, int64_t n, int64_t label, float l2wrap, float* shifts) {
  const float at_label = x[label];
  float largest = kLowest;
  int64_t place = 0;  // of the largest
  double sum = 0;     // of e^(x - largest)
  for (int64_t first = 0; first < n; first += kStrip) {
    float* strip = x + first;
    const int64_t count = std::min(kStrip, n - first);
    const float here = largest_of(strip, count);
    if (here > largest) {
      sum *= exponential(largest - here).value()[0];
      if (l2wrap != 0) place = std::find(strip, strip + count, here) - x;
      largest = here;
    }
    shifts[first / kStrip] = largest;
    Vec lanes = {};
    transform(strip, count, [&](Vec v) __attribute__((always_inline)) {
      v = exponential(v - largest).value();
      lanes += v;
      return v;
    });
    for (int l = 0; l < LANES; ++l) sum += lanes[l];
  }
  const float log_sum = std::log(sum);
  for (int64_t first = 0; first < n; first += kStrip) {
    const float scale = exponential((shifts[first / kStrip] - largest) - log_sum).value()[0];
    transform(x + first, std::min(kStrip, n - first),
              [=](Vec v) __attribute__((always_inline)) { return v * scale; });
  }
  x[label] = exponential((at_label - largest) - log_sum).minus_one()[0];
  if (l2wrap != 0) x[place] += l2wrap * largest;
  return (largest - at_label) + log_sum;
}

static void cross_entropy(void* logits, Element element, int64_t n, const int64_t* labels,
                          float l2wrap, float* losses, int64_t first, int64_t last) {
  DenormalsAreZero while_alive;
  const bool wide = element == Element::kFloat32;
  Scratch shifts(n / kStrip + 1), floats(wide ? 0 : n);
  for (int64_t row = first; row < last; ++row) {
    float* x = wide ? static_cast<float*>(logits) + row * n : floats.data;
    if (!wide) load_row(x, logits, element, row * n, n);
    losses[row] = cross_entropy_row(x, n, labels[row], l2wrap, shifts.data);
    if (!wide) store_row(x, logits, element, row * n, n);
  }
}

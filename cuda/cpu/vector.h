// Vectors of LANES floats: the exponential, sums of lanes, memory. Part of kernels.h.

typedef float Vec __attribute__((vector_size(4 * LANES), may_alias));
typedef float UnalignedVec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));

static inline Vec& vec(float* p) { return *reinterpret_cast<Vec*>(p); }
static inline const Vec& vec(const float* p) { return *reinterpret_cast<const Vec*>(p); }

// The sums of kCount vectors, LANES or half as many: lane i of the result adds the lanes of x[i],
// and so does lane kCount + i. Overwrites x.
template <int kCount = LANES>
static inline __attribute__((always_inline)) Vec sums_of_lanes(Vec* x) {
  IntVec even, odd;
  for (int l = 0; l < LANES; ++l) even[l] = 2 * l, odd[l] = 2 * l + 1;
#pragma GCC unroll 4
  for (int count = kCount / 2; count >= 1; count /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i)
      x[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], even) +
             __builtin_shuffle(x[2 * i], x[2 * i + 1], odd);
  if (kCount < LANES) x[0] = __builtin_shuffle(x[0], even) + __builtin_shuffle(x[0], odd);
  return x[0];
}

// LANES vectors, the rows of a square, become its columns: at each step two rows exchange the lanes
// that lie on the wrong side.
static inline void transpose(Vec* x) {
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2) {
    IntVec low, high;
    for (int l = 0; l < LANES; ++l)
      low[l] = l & step ? LANES + l - step : l, high[l] = l & step ? LANES + l : l + step;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i)
      if (!(i & step)) {
        const Vec first = x[i], second = x[i + step];
        x[i] = __builtin_shuffle(first, second, low);
        x[i + step] = __builtin_shuffle(first, second, high);
      }
  }
}

// A bound on x that lets NaN pass. GCC makes two instructions of the plain form.
static inline Vec at_least(float bound, Vec x) {
#if LANES == 16
  return _mm512_max_ps(_mm512_set1_ps(bound), x);
#elif LANES == 8
  return _mm256_max_ps(_mm256_set1_ps(bound), x);
#else
  return x < bound ? Vec{} + bound : x;
#endif
}

static inline Vec square_root(Vec x) {
#if LANES == 16
  return _mm512_sqrt_ps(x);
#elif LANES == 8
  return _mm256_sqrt_ps(x);
#else
  for (int l = 0; l < LANES; ++l) x[l] = std::sqrt(x[l]);
  return x;
#endif
}

static inline Vec at_most(float bound, Vec x) { return -at_least(-bound, -x); }

// e^x = scale + scale * rest, with scale a power of two: keeps e^x - 1 precise near x = 0.
struct Exponential {
  Vec scale, rest;
  Vec value() const { return scale + scale * rest; }
  Vec minus_one() const { return (scale - 1.0f) + scale * rest; }
};

// For x up to 80; e^-87 stands for all below, so that no result is denormal.
static inline Exponential exponential(Vec x) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = at_least(-87.0f, x);
  Vec shifted = x * 1.44269504f + kRound;
  Vec n = shifted - kRound;
  Vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2, with ln 2 in two parts
  // (e^f - 1 - f) / f^2 by a Chebyshev fit of degree 4, so that e^f - 1 is off by 1.4e-8 of itself.
  Vec series = 0.00138581541f * f + 0.00836668013f;
  series = series * f + 0.0416675968f;
  series = series * f + 0.166665419f;
  series = series * f + 0.499999967f;
  IntVec exponent = ((IntVec)shifted << 23) + (127 << 23);  // n stands in the low bits
  return {(Vec)exponent, series * f * f + f};
}

// Scratch memory of `count` floats, aligned for any vector.
struct Scratch {
  std::unique_ptr<char[]> memory;
  float* data;
  explicit Scratch(int64_t count) : memory(new char[count * sizeof(float) + 64]) {
    uintptr_t address = reinterpret_cast<uintptr_t>(memory.get());
    data = reinterpret_cast<float*>((address + 63) / 64 * 64);
  }
};

// Products of strong decays sink into denormal numbers, on which some processors are a hundred
// times slower; while one of these lives, they are zero instead.
struct DenormalsAreZero {
#ifdef __SSE__
  unsigned before = __builtin_ia32_stmxcsr();
  DenormalsAreZero() { __builtin_ia32_ldmxcsr(before | 0x8040); }
  ~DenormalsAreZero() { __builtin_ia32_ldmxcsr(before); }
#endif
};

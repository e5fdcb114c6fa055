// Elements in memory, fp32 or bf16, and the way into fp32 and back. Part of kernels.h.

// A number of elements that is a whole vector's, and known to the compiler.
typedef std::integral_constant<int64_t, LANES> Whole;

// f(i, count) for a vector's worth of elements at a time: `count` is a Whole but for the last.
template <typename F>
static inline __attribute__((always_inline)) void for_vectors(int64_t first, int64_t last, F f) {
  int64_t i = first;
  for (; i + LANES <= last; i += LANES) f(i, Whole());
  if (i < last) f(i, last - i);
}

// Loads and stores of up to LANES elements; lanes past `count` hold zeros.
struct Float32 {
  typedef float Type;
  static Vec wide(const Type* from) { return *reinterpret_cast<const UnalignedVec*>(from); }
  static void narrow(Type* to, Vec x) { *reinterpret_cast<UnalignedVec*>(to) = x; }
};

struct Bfloat16 {  // the upper half of an fp32
  typedef uint16_t Type;
  typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

  static Vec wide(const Type* from) {
    const Halves halves = *reinterpret_cast<const Halves*>(from);
#if LANES == 16  // GCC 12 makes five instructions of a conversion, and three of the other
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)halves), 16);
#else
    return (Vec)(__builtin_convertvector(halves, Bits) << 16);
#endif
  }
  static void narrow(Type* to, Vec x) {
    const Bits bits = (Bits)x, nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits result = x == x ? nearest_even : Bits{} + 0x7fc0;  // else a NaN, which stays one
#if LANES == 16
    *reinterpret_cast<Halves*>(to) = (Halves)_mm512_cvtepi32_epi16((__m512i)result);
#else
    *reinterpret_cast<Halves*>(to) = __builtin_convertvector(result, Halves);
#endif
  }
};

template <typename E>
static inline Vec load(const void* data, int64_t at, Whole) {
  return E::wide(static_cast<const typename E::Type*>(data) + at);
}

template <typename E>
static inline Vec load(const void* data, int64_t at, int64_t count) {
  typename E::Type elements[LANES] = {};
  std::memcpy(elements, static_cast<const typename E::Type*>(data) + at, count * sizeof *elements);
  return E::wide(elements);
}

template <typename E>
static inline void store(void* data, int64_t at, Vec x, Whole) {
  E::narrow(static_cast<typename E::Type*>(data) + at, x);
}

template <typename E>
static inline void store(void* data, int64_t at, Vec x, int64_t count) {
  typename E::Type elements[LANES];
  E::narrow(elements, x);
  std::memcpy(static_cast<typename E::Type*>(data) + at, elements, count * sizeof *elements);
}

// f(a Float32 or a Bfloat16)
template <typename F>
static inline __attribute__((always_inline)) void with_element(Element element, F f) {
  element == Element::kFloat32 ? f(Float32()) : f(Bfloat16());
}

static inline void copy(float* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    *reinterpret_cast<UnalignedVec*>(to + i) = *reinterpret_cast<const UnalignedVec*>(from + i);
  if (i < n) std::memcpy(to + i, from + i, (n - i) * sizeof(float));
}

static inline void load_row(float* row, const void* data, Element element, int64_t at, int64_t n) {
  if (element == Element::kFloat32) {
    copy(row, static_cast<const float*>(data) + at, n);
    return;
  }
  for_vectors(0, n, [=](int64_t i, auto count) __attribute__((always_inline)) {
    store<Float32>(row, i, load<Bfloat16>(data, at + i, count), count);
  });
}

static inline void store_row(const float* row, void* data, Element element, int64_t at, int64_t n) {
  if (element == Element::kFloat32) {
    copy(static_cast<float*>(data) + at, row, n);
    return;
  }
  for_vectors(0, n, [=](int64_t i, auto count) __attribute__((always_inline)) {
    store<Bfloat16>(data, at + i, load<Float32>(row, i, count), count);
  });
}

enum class For { kReading, kWriting };

// Asks for bytes ahead of their use, into the second-level cache: the first holds a state and
// little more.
template <For use>
static inline void ask_for(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(static_cast<const char*>(data) + i, use == For::kWriting, 2);
  // GCC drops calls of functions without effects, and takes those that only prefetch for such.
  asm volatile("");
}

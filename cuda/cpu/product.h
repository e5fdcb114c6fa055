// Products of rows with a weight, each element in one order of summation. Part of kernels.h.
//
// An element is summed in LANES strands over the columns of W, which are then added up pairwise;
// tiles of any shape do the same. Tiles hold as many strands as fit into the registers: few rows
// are limited by reading W, which is asked for ahead of its use, many rows by arithmetic.

constexpr int kStrands = LANES == 16 ? 16 : 8;  // vectors of sums that a tile holds
constexpr int kTileRows = LANES == 16 ? 4 : 2;
constexpr int64_t kPanelRows = 64;  // rows of x that stay in the second-level cache

static inline Vec activated(Vec x, Activation activation) {
  if (activation == Activation::kSquaredRelu) {
    const Vec positive = at_least(0.0f, x);
    return positive * positive;
  }
  if (activation == Activation::kTanh) {
    // -(e^-2|x| - 1) / (e^-2|x| + 1) with the sign of x, precise near 0
    const Vec magnitude = at_least(0.0f, x) + at_least(0.0f, -x);
    const Vec less_one = exponential(-2.0f * magnitude).minus_one();
    const Vec result = -less_one / (less_one + 2.0f);
    return x < 0.0f ? -result : result;
  }
  return x;
}

// The columns of y from `out` on of kRows rows from `row` on: as many as there are strands for.
template <typename E, int kRows, bool kAhead>
static inline void product_tile(const Product& p, int64_t out, int64_t row) {
  constexpr int kOuts = kRows == 3 ? 4 : kStrands / kRows;
  Vec strands[kStrands] = {};
  int64_t weights[kOuts];
  for (int o = 0; o < kOuts; ++o)
    weights[o] = (std::min(out + o, p.n_out - 1) - p.first_out) * p.n_in;
  for_vectors(0, p.n_in, [&](int64_t i, auto count) __attribute__((always_inline)) {
    Vec w[kOuts];
#pragma GCC unroll 16
    for (int o = 0; o < kOuts; ++o) {
      w[o] = load<E>(p.W, weights[o] + i, count);
      if (kAhead)
        __builtin_prefetch(static_cast<const typename E::Type*>(p.W) + weights[o] + kOuts * p.n_in +
                           i);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec x = load<Float32>(p.x, (row + r) * p.x_stride + i, count);
#pragma GCC unroll 16
      for (int o = 0; o < kOuts; ++o) strands[r * kOuts + o] += w[o] * x;
    }
  });
  float sums[kStrands];
  for (int s = 0; s < kStrands; s += LANES) {
    const Vec total = activated(sums_of_lanes(strands + s), p.activation);
    std::memcpy(sums + s, &total, sizeof total);
  }
  const int64_t n = std::min<int64_t>(kOuts, p.n_out - out);
  for (int r = 0; r < kRows; ++r)
    store_row(sums + r * kOuts, p.y, p.element, (row + r) * p.n_out + out, n);
}

template <typename E, int kRows, bool kAhead>
static inline void product_tiles(const Product& p, int64_t out, int64_t row) {
  constexpr int kOuts = kRows == 3 ? 4 : kStrands / kRows;
  const int64_t last = std::min(out + kProductOuts, p.n_out);
  for (; out < last; out += kOuts) product_tile<E, kRows, kAhead>(p, out, row);
}

template <typename E>
static void product_of(const Product& p, int64_t first, int64_t last) {
  for (int64_t panel = 0; panel < p.n_rows; panel += kPanelRows) {
    const int64_t end = std::min(panel + kPanelRows, p.n_rows);
    const int64_t rest = (end - panel) % kTileRows, whole = end - rest;
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kProductOuts;
      const int64_t stop = std::min(begin + kProductOuts, p.n_out);
      for (int64_t out = begin; whole > panel && out < stop; out += kStrands / kTileRows) {
        product_tile<E, kTileRows, true>(p, out, panel);
        for (int64_t row = panel + kTileRows; row < whole; row += kTileRows)
          product_tile<E, kTileRows, false>(p, out, row);
      }
      if (rest == 1) product_tiles<E, 1, true>(p, begin, whole);
      if (rest == 2) product_tiles<E, 2, true>(p, begin, whole);
      if (rest == 3) product_tiles<E, 3, true>(p, begin, whole);
    }
  }
}

static void product(const Product& p, int64_t first, int64_t last) {
  with_element(p.element, [&](auto e) { product_of<decltype(e)>(p, first, last); });
}

// LANES bytes as integers. GCC 12 takes them one by one in the plain form.
template <typename Byte>
static inline IntVec wide_bytes(const uint8_t* bytes) {
  constexpr bool kSigned = std::is_signed<Byte>::value;
#if LANES == 16
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return (IntVec)(kSigned ? _mm512_cvtepi8_epi32(x) : _mm512_cvtepu8_epi32(x));
#elif LANES == 8
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  return (IntVec)(kSigned ? _mm256_cvtepi8_epi32(x) : _mm256_cvtepu8_epi32(x));
#else
  IntVec wide;
  for (int l = 0; l < LANES; ++l) wide[l] = static_cast<Byte>(bytes[l]);
  return wide;
#endif
}

// Codes -> what they stand for: each reads LANES bytes and gives kVectors vectors.
struct Integers {
  static constexpr int kVectors = 1;
  explicit Integers(const float*) {}
  void decode(const uint8_t* codes, Vec* out) const {
    out[0] = __builtin_convertvector(wide_bytes<int8_t>(codes), Vec);
  }
};

struct TableOfBytes {
  static constexpr int kVectors = 1;
  const float* table;
  explicit TableOfBytes(const float* table) : table(table) {}
  void decode(const uint8_t* codes, Vec* out) const {
    for (int l = 0; l < LANES; ++l) out[0][l] = table[codes[l]];
  }
};

struct TableOfHalfBytes {
  static constexpr int kVectors = 2;
  const float* values;
  Vec table[16 / LANES];
  IntVec first, second;  // lanes of two vectors that take turns

  explicit TableOfHalfBytes(const float* values) : values(values) {
    std::memcpy(table, values, sizeof table);
    for (int l = 0; l < LANES; ++l)
      first[l] = l / 2 + l % 2 * LANES, second[l] = first[l] + LANES / 2;
  }

  Vec look_up(IntVec codes) const {
#if LANES == 16
    return __builtin_shuffle(table[0], codes);
#elif LANES == 8
    return __builtin_shuffle(table[0], table[1], codes);
#else
    Vec found;
    for (int l = 0; l < LANES; ++l) found[l] = values[codes[l]];
    return found;
#endif
  }

  void decode(const uint8_t* codes, Vec* out) const {
    const IntVec bytes = wide_bytes<uint8_t>(codes);
    const Vec upper = look_up(bytes >> 4), lower = look_up(bytes & 15);
    out[0] = __builtin_shuffle(upper, lower, first);
    out[1] = __builtin_shuffle(upper, lower, second);
  }
};

// Pieces of y: the rows of W of each are decoded into memory that stays in the cache.
template <typename E, typename Codes>
static void coded_product_of(const CodedProduct& p, int64_t first, int64_t last) {
  constexpr int64_t kBytes = kCodedBlock / Codes::kVectors;
  const Codes coding(p.table);
  Product part = p.product;
  Scratch W(kProductOuts * part.n_in + 2 * kCodedBlock);
  for (int64_t piece = first; piece < last; ++piece) {
    part.first_out = piece * kProductOuts;
    const int64_t begin = part.first_out * part.n_in;
    const int64_t end = std::min(part.first_out + kProductOuts, part.n_out) * part.n_in;
    const int64_t first_block = begin / kCodedBlock;
    int64_t at = 0;
    for (int64_t block = first_block; block * kCodedBlock < end; ++block)
      for (int64_t byte = 0; byte < kBytes; byte += LANES) {
        Vec elements[Codes::kVectors];
        coding.decode(p.codes + block * kBytes + byte, elements);
        for (int v = 0; v < Codes::kVectors; ++v, at += LANES)
          store<E>(W.data, at, elements[v] * p.scales[block], Whole());
      }
    part.W = reinterpret_cast<typename E::Type*>(W.data) + (begin - first_block * kCodedBlock);
    product_of<E>(part, piece, piece + 1);
  }
}

static void coded_product(const CodedProduct& p, int64_t first, int64_t last) {
  with_element(p.product.element, [&](auto e) {
    typedef decltype(e) E;
    if (p.coding == Coding::kInteger) coded_product_of<E, Integers>(p, first, last);
    if (p.coding == Coding::kByte) coded_product_of<E, TableOfBytes>(p, first, last);
    if (p.coding == Coding::kHalfByte) coded_product_of<E, TableOfHalfBytes>(p, first, last);
  });
}

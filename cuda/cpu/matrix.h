// Products of a chunk's rows with the state, in blocks that stay in registers. Part of
// kernels.h. Matrices have rows of `width` floats, head_size of them.

constexpr int kBlockRows = 4, kBlockVecs = LANES == 16 ? 4 : 2;

typedef float Pairs[kTokens][kTokens];  // [later token i][earlier token j], 0 for j > i

template <int kVecs>
struct Block {
  Vec at[kBlockRows][kVecs] = {};

  // at[r] += sum over p < n of weights[r * row + p * step] * x[p * x_step ...]
  // A vector of x and a weight serve several products each, so that arithmetic is the limit and
  // not the loads.
  inline __attribute__((always_inline)) void add(const float* weights, int64_t row, int64_t step,
                                                 const float* x, int64_t x_step, int64_t n) {
    for (int64_t p = 0; p < n; ++p)
#pragma GCC unroll 4
      for (int r = 0; r < kBlockRows; ++r) {
        const float weight = weights[r * row + p * step];
#pragma GCC unroll 4
        for (int q = 0; q < kVecs; ++q) at[r][q] += weight * vec(x + p * x_step + q * LANES);
      }
  }

  void store(Row* rows, int64_t column) const {
    for (int r = 0; r < kBlockRows; ++r) std::memcpy(rows[r].at + column, at[r], sizeof at[r]);
  }

  void add_to(float* rows, int64_t row) const {
    for (int r = 0; r < kBlockRows; ++r)
      for (int q = 0; q < kVecs; ++q) vec(rows + r * row + q * LANES) += at[r][q];
  }
};

// Calls f(a number of vectors as a type, its first column) for all columns: kVecs at a time, then
// one by one.
template <int kVecs = kBlockVecs, typename F>
static inline __attribute__((always_inline)) void for_columns(int64_t width, F f) {
  int64_t column = 0;
  for (; column + kVecs * LANES <= width; column += kVecs * LANES)
    f(std::integral_constant<int, kVecs>(), column);
  for (; column < width; column += LANES) f(std::integral_constant<int, 1>(), column);
}

// out_i = sum_p a_i[p] X[p]
static inline void multiply(Row* out, const Row* a, const float* X, int64_t n, int64_t width) {
  for_columns(width, [=](auto vecs, int64_t column) __attribute__((always_inline)) {
    for (int i = 0; i < kTokens; i += kBlockRows) {
      Block<vecs> block;
      block.add(a[i].at, kRowStride, 1, X + column, width, n);
      block.store(out + i, column);
    }
  });
}

enum class Of { kLaterToken, kEarlierToken };  // whose rows a sum over pairs gives

// The same and what the chunk's pairs add: sum_j A_ij z_j to the later token i of each, or
// sum_i A_ij z_i to the earlier token j.
template <Of of>
static inline void multiply_with_pairs(Row* out, const Row* a, const float* X,
                                       const float (*A)[kTokens], const Row* z, int64_t n,
                                       int64_t width) {
  for_columns(width, [=](auto vecs, int64_t column) __attribute__((always_inline)) {
    for (int i = 0; i < kTokens; i += kBlockRows) {
      Block<vecs> block;
      if (of == Of::kLaterToken)
        block.add(A[i], kTokens, 1, z[0].at + column, kRowStride, i + kBlockRows);
      else
        block.add(A[i] + i, 1, kTokens, z[i].at + column, kRowStride, kTokens - i);
      block.add(a[i].at, kRowStride, 1, X + column, width, n);
      block.store(out + i, column);
    }
  });
}

enum class Keys { kRows, kColumns };  // which way the keys run in a state matrix

// to[p] = (1 - lost) * from[p] + sum_i a_i[p] z_i; `lost` belongs to the keys.
template <Keys keys>
static inline void advance(float* to, const float* from, const float* lost, const Row* a,
                           const Row* z, int64_t n, int64_t width) {
  for_columns(width, [=](auto vecs, int64_t column) __attribute__((always_inline)) {
    for (int64_t p = 0; p < n; p += kBlockRows) {
      Block<vecs> change;
      for (int r = 0; r < kBlockRows; ++r)
        for (int q = 0; q < vecs; ++q) {
          const int64_t m = column + q * LANES;
          const Vec x = vec(from + (p + r) * width + m);
          change.at[r][q] = keys == Keys::kRows ? -lost[p + r] * x : -vec(lost + m) * x;
        }
      change.add(a[0].at + p, 1, kRowStride, z[0].at + column, kRowStride, kTokens);
      for (int r = 0; r < kBlockRows; ++r)
        for (int q = 0; q < vecs; ++q) {
          const int64_t at = (p + r) * width + column + q * LANES;
          vec(to + at) = vec(from + at) + change.at[r][q];  // a large x is rounded once in a chunk
        }
    }
  });
}

// out = sum_p X[p] * Y[p], element by element.
static inline void products_over_rows(float* out, const float* X, const float* Y, int64_t n,
                                      int64_t width) {
  for_columns(width, [=](auto vecs, int64_t column) __attribute__((always_inline)) {
    Vec sums[vecs] = {};
    for (int64_t p = 0; p < n; ++p)
      for (int q = 0; q < vecs; ++q) {
        const int64_t at = p * width + column + q * LANES;
        sums[q] += vec(X + at) * vec(Y + at);
      }
    std::memcpy(out + column, sums, sizeof sums);
  });
}

// A square matrix between its dense form in memory and rows of `width`, plain or transposed.
static inline void unpack_rows(float* padded, const float* dense, int64_t rows, int64_t n,
                               int64_t width) {
  for (int64_t p = 0; p < rows; ++p) {
    std::memcpy(padded + p * width, dense + p * n, n * sizeof(float));
    std::memset(padded + p * width + n, 0, (width - n) * sizeof(float));
  }
}

static inline void unpack(float* padded, const float* dense, int64_t n, int64_t width) {
  unpack_rows(padded, dense, n, n, width);
}

static inline void unpack_transposed(float* padded, const float* dense, int64_t n, int64_t width) {
  std::memset(padded, 0, n * width * sizeof(float));
  for (int64_t p = 0; p < n; ++p)
    for (int64_t q = 0; q < n; ++q) padded[q * width + p] = dense[p * n + q];
}

static inline void pack(float* dense, const float* padded, int64_t n, int64_t width) {
  for (int64_t p = 0; p < n; ++p) std::memcpy(dense + p * n, padded + p * width, n * sizeof(float));
}

// A square matrix of `width` rows, all whole vectors.
static inline void transpose(float* to, const float* from, int64_t width) {
  for (int64_t p = 0; p < width; p += LANES)
    for (int64_t q = 0; q < width; q += LANES) {
      Vec x[LANES];
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l) x[l] = vec(from + (p + l) * width + q);
      transpose(x);
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l) vec(to + (q + l) * width + p) = x[l];
    }
}

// Token rows of a WKV operator: where those of a head lie. Part of kernels.h.

constexpr int kTokens = 8;  // tokens of a chunk
// Floats from one row to the next. At a power of two, the rows would share few sets of the cache.
constexpr int kRowStride = kMaxHeadSize + 16;

// The heads of one sequence alternate after so many tokens: a token's heads lie side by side, so that
// memory is then read nearly in order. Their states stay in the second-level cache.
constexpr int64_t kForwardTurn = 16;

// w of a token that does not exist: its decay is exp(-exp(w)) = 1.
constexpr float kNoDecay = -std::numeric_limits<float>::infinity();

struct alignas(64) Row {
  float at[kRowStride];
  Vec& vec(int64_t n) { return *reinterpret_cast<Vec*>(at + n); }
  const Vec& vec(int64_t n) const { return *reinterpret_cast<const Vec*>(at + n); }
};

// A head's row in whole vectors. Lanes past head_size hold zeros, so that no loop needs a tail.
static inline int64_t padded_width(int64_t head_size) {
  return (head_size + LANES - 1) / LANES * LANES;
}

// One head of one sequence: where its tokens lie.
struct Head {
  int64_t sequence, head_size, width, first_token, n_tokens, token_stride, offset;
  Element element;

  Head(const WkvShape& shape, int64_t index)
      : sequence(index / shape.n_heads),
        head_size(shape.head_size),
        width(padded_width(shape.head_size)),
        first_token(shape.bounds[sequence]),
        n_tokens(shape.bounds[sequence + 1] - first_token),
        token_stride(shape.n_heads * shape.head_size),
        offset(index % shape.n_heads * shape.head_size),
        element(shape.element) {}

  int64_t position(int64_t token) const { return (first_token + token) * token_stride + offset; }
  int64_t rows(int64_t token) const { return std::min<int64_t>(kTokens, n_tokens - token); }

  // The row of a token; lanes past head_size are filled with `missing`.
  void load(Row& row, const void* data, int64_t token, float missing = 0.0f) const {
    load_row(row.at, data, element, position(token), head_size);
    for (int64_t n = head_size; n < width; ++n) row.at[n] = missing;
  }

  // The rows of a chunk. Those past the end of the sequence are filled with `missing`.
  void load(Row (&chunk)[kTokens], const void* data, int64_t token, float missing = 0.0f) const {
    const int64_t n_rows = rows(token);
    for (int64_t i = 0; i < n_rows; ++i) load(chunk[i], data, token + i, missing);
    for (int64_t i = n_rows; i < kTokens; ++i)
      for (int64_t n = 0; n < width; ++n) chunk[i].at[n] = missing;
  }

  void store(const Row& row, void* data, int64_t token) const {
    store_row(row.at, data, element, position(token), head_size);
  }

  void store(const Row (&chunk)[kTokens], void* data, int64_t token) const {
    for (int64_t i = 0; i < rows(token); ++i) store(chunk[i], data, token + i);
  }

  // Rows lie too far apart for the processor to see them coming.
  template <For use = For::kReading>
  void prefetch_row(const void* data, int64_t token) const {
    const int64_t size = element == Element::kFloat32 ? 4 : 2;
    ask_for<use>(static_cast<const char*>(data) + position(token) * size, head_size * size);
  }

  void prefetch(const void* data, int64_t token) const {
    if (token < 0) return;
    for (int64_t i = 0; i < rows(token); ++i) prefetch_row(data, token + i);
  }
};

// Where a head's state before `token` is saved for backward.
static inline int64_t checkpoint_offset(const WkvShape& shape, const Head& head, int64_t token) {
  int64_t row = checkpoint_index(shape, head.sequence, token) * head.token_stride + head.offset;
  return row * head.head_size;
}

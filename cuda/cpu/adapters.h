// Bone and Bat in row mode, the parts beside the products with W: a token's row is cut into shards
// of r channels. Part of kernels.h.

// to += from, n floats each, anywhere in memory.
static inline void add_row(float* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    UnalignedVec& sum = *reinterpret_cast<UnalignedVec*>(to + i);
    sum = sum + *reinterpret_cast<const UnalignedVec*>(from + i);
  }
  for (; i < n; ++i) to[i] += from[i];
}

static void shard_sums(const void* x, Element element, int64_t k, int64_t r, void* sums,
                       Element of_sums, int64_t first, int64_t last) {
  const bool wide = element == Element::kFloat32;
  Scratch sum(r), floats(wide ? 0 : k);
  for (int64_t t = first; t < last; ++t) {
    const float* row = wide ? static_cast<const float*>(x) + t * k : floats.data;
    if (!wide) load_row(floats.data, x, element, t * k, k);
    std::memset(sum.data, 0, r * sizeof(float));
    for (int64_t at = 0; at < k; at += r) add_row(sum.data, row + at, std::min(r, k - at));
    store_row(sum.data, sums, of_sums, t * r, r);
  }
}

static void add_to_shards(void* x, Element element, int64_t k, const void* s, Element of_s,
                          int64_t r, int64_t first, int64_t last) {
  const bool wide = element == Element::kFloat32;
  Scratch added(r), floats(wide ? 0 : k);
  for (int64_t t = first; t < last; ++t) {
    float* row = wide ? static_cast<float*>(x) + t * k : floats.data;
    if (!wide) load_row(row, x, element, t * k, k);
    load_row(added.data, s, of_s, t * r, r);
    for (int64_t at = 0; at < k; at += r) add_row(row + at, added.data, std::min(r, k - at));
    if (!wide) store_row(row, x, element, t * k, k);
  }
}

constexpr int64_t kTileTokens = 32;

// Some tokens of one shard, copied to where rows are whole vectors and share no sets of the cache.
// Lanes past r hold zeros.
struct Tile {
  const int64_t r, width, row_of_x;
  const Element element;
  Scratch memory;

  explicit Tile(const Shards& shape)
      : r(shape.r),
        width(shape.width()),
        row_of_x(shape.n_shards * r),
        element(shape.element),
        memory(kTileTokens * width) {
    clear();
  }

  float* at(int64_t token) const { return memory.data + token * width; }

  void clear() const { std::memset(memory.data, 0, kTileTokens * width * sizeof(float)); }

  void load(const void* x, int64_t token, int64_t shard, int64_t n) const {
    for (int64_t t = 0; t < n; ++t)
      load_row(at(t), x, element, (token + t) * row_of_x + shard * r, r);
  }

  void store(void* x, int64_t token, int64_t shard, int64_t n) const {
    for (int64_t t = 0; t < n; ++t)
      store_row(at(t), x, element, (token + t) * row_of_x + shard * r, r);
  }

  // Rows lie too far apart for the processor to see what comes next.
  void prefetch(const void* x, int64_t token, int64_t shard, int64_t n) const {
    const int64_t size = element == Element::kFloat32 ? 4 : 2;
    for (int64_t t = 0; t < n; ++t) {
      const char* row = static_cast<const char*>(x) + ((token + t) * row_of_x + shard * r) * size;
      for (int64_t i = 0; i < r * size; i += 64) __builtin_prefetch(row + i, 0, 2);
    }
  }
};

// Every x_b becomes x_b + u_b with u_b = D_b x_b; sums (T, r) are those of u over the shards. Takes
// the D_b transposed.
static void bat_row_forward(const Shards& shape, const void* x, const float* D, void* moved,
                            float* sums, int64_t first, int64_t last) {
  DenormalsAreZero while_alive;
  const int64_t r = shape.r, width = shape.width();
  const Tile from(shape), to(shape), sum(shape);
  for (; first < last; first += kTileTokens) {
    const int64_t n = std::min(kTileTokens, last - first);
    sum.clear();
    for (int64_t b = 0; b < shape.n_shards; ++b) {
      from.load(x, first, b, n);
      if (b + 1 < shape.n_shards) from.prefetch(x, first, b + 1, n);
      for_columns(width, [&](auto vecs, int64_t column) __attribute__((always_inline)) {
        for (int64_t t = 0; t < n; t += kBlockRows) {
          Block<vecs> u;
          u.add(from.at(t), width, 1, D + b * r * width + column, width, r);
          for (int i = 0; i < kBlockRows; ++i)
            for (int q = 0; q < vecs; ++q) {
              const int64_t at = i * width + column + q * LANES;
              vec(sum.at(t) + at) += u.at[i][q];
              vec(to.at(t) + at) = vec(from.at(t) + at) + u.at[i][q];
            }
        }
      });
      to.store(moved, first, b, n);
    }
    for (int64_t t = 0; t < n; ++t)
      store_row(sum.at(t), sums, Element::kFloat32, (first + t) * r, r);
  }
}

// With q_b = dx_b + sums, of every token: dx_b += q_b D_b and dD_b = q_b^T x_b, over shards first to
// last. Few channels at a time go through all tokens, whole lines of the cache where r is small.
static void bat_row_backward(const Shards& shape, void* dx, const void* x, const float* D,
                             const float* sums, void* dD, int64_t first, int64_t last) {
  DenormalsAreZero while_alive;
  const int64_t r = shape.r, width = shape.width();
  const int64_t together = std::max<int64_t>(1, 64 / r);
  const Tile input(shape), output(shape), q(shape), sum(shape);
  Scratch gradients(together * width * width);
  for (; first < last; first += together) {
    const int64_t count = std::min(together, last - first);
    std::memset(gradients.data, 0, count * width * width * sizeof(float));
    for (int64_t token = 0; token < shape.n_tokens; token += kTileTokens) {
      const int64_t n = std::min(kTileTokens, shape.n_tokens - token);
      const int64_t n_next = std::min(kTileTokens, shape.n_tokens - token - n);
      for (int64_t t = 0; t < n; ++t)
        load_row(sum.at(t), sums, Element::kFloat32, (token + t) * r, r);
      for (int64_t b = first; b < first + count; ++b) {
        input.load(x, token, b, n);
        output.load(dx, token, b, n);
        input.prefetch(x, token + n, b, n_next);
        output.prefetch(dx, token + n, b, n_next);
        for (int64_t at = 0; at < n * width; at += LANES)
          vec(q.at(0) + at) = vec(output.at(0) + at) + vec(sum.at(0) + at);
        float* gradient = gradients.data + (b - first) * width * width;
        for_columns(width, [&](auto vecs, int64_t column) __attribute__((always_inline)) {
          for (int64_t t = 0; t < n; t += kBlockRows) {
            Block<vecs> moved;
            moved.add(q.at(t), width, 1, D + b * r * width + column, width, r);
            moved.add_to(output.at(t) + column, width);
          }
          for (int64_t i = 0; i < r; i += kBlockRows) {
            Block<vecs> change;
            change.add(q.at(0) + i, 1, width, input.at(0) + column, width, n);
            change.add_to(gradient + i * width + column, width);
          }
        });
        output.store(dx, token, b, n);
      }
    }
    for (int64_t i = 0; i < count * r; ++i) {
      const float* row = gradients.data + (i / r * width + i % r) * width;
      store_row(row, dD, shape.element, (first * r + i) * r, r);
    }
  }
}

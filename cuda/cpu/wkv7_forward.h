// WKV7, token by token. Part of kernels.h.
//
//   S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t
//
// S has rows of keys, one for each value, and no row needs another: LANES values pass through all
// tokens of a chunk together, so that their sums over the keys come out as one vector.

struct Wkv7Chunk {
  Row r[kTokens], k[kTokens], v[kTokens], decay[kTokens], a[kTokens], b[kTokens];
  Row rate[kTokens];  // -log decay

  void load(const Head& head, const Wkv7Inputs& in, int64_t token) {
    head.load(r, in.r, token);
    head.load(k, in.k, token);
    head.load(v, in.v, token);
    head.load(a, in.a, token);
    head.load(b, in.b, token);
    head.load(decay, in.w, token, kNoDecay);
    for (int64_t i = 0; i < head.rows(token); ++i)
      for (int64_t n = 0; n < head.width; n += LANES) {
        rate[i].vec(n) = exponential(at_most(80.0f, decay[i].vec(n))).value();
        decay[i].vec(n) = exponential(-rate[i].vec(n)).value();
      }
  }

  static void prefetch(const Head& head, const Wkv7Inputs& in, int64_t token) {
    for (const void* data : {in.r, in.k, in.v, in.w, in.a, in.b}) head.prefetch(data, token);
  }
};

// Vectors of a row from `column` on. Copied first, since the compiler must assume that a store to a
// state may change a row.
template <int kVecs>
struct Part {
  Vec at[kVecs];
  inline __attribute__((always_inline)) Part(const Row& row, int64_t column) {
#pragma GCC unroll 4
    for (int q = 0; q < kVecs; ++q) at[q] = row.vec(column + q * LANES);
  }
};

// The products of LANES rows with x, one in each lane.
static inline Vec products_with_rows(const float* rows, const Row& x, int64_t width) {
  Vec sums[LANES] = {};
  for_columns(width, [&](auto vecs, int64_t column) __attribute__((always_inline)) {
    const Part<vecs> part(x, column);
    for (int p = 0; p < LANES; ++p)
      for (int q = 0; q < vecs; ++q)
        sums[p] += vec(rows + p * width + column + q * LANES) * part.at[q];
  });
  return sums_of_lanes(sums);
}

// What a step of LANES values sums over the keys, one value in each lane: S_t r_t, and S_t a_{t+1}
// of the token after it.
struct Wkv7Sums {
  Vec read, removed;
};

// LANES values, the first of them `value`, from before token i of the chunk to after it; `removed`
// is their S_{t-1} a_t.
static inline Wkv7Sums wkv7_step(const Wkv7Chunk& c, int i, const Row& next_a, int64_t value,
                                 Vec removed, const float* before, float* after, int64_t width) {
  alignas(64) float by[LANES];
  vec(by) = removed;
  Vec read[LANES] = {}, next[LANES] = {};
  for_columns(width, [&](auto vecs, int64_t column) __attribute__((always_inline)) {
    const Part<vecs> decay(c.decay[i], column), b(c.b[i], column), k(c.k[i], column);
    const Part<vecs> r(c.r[i], column), a(next_a, column);
    for (int p = 0; p < LANES; ++p) {
      Vec read_sum = read[p], next_sum = next[p];
      for (int q = 0; q < vecs; ++q) {
        const int64_t at = p * width + column + q * LANES;
        Vec S = vec(before + at) * decay.at[q];
        S += by[p] * b.at[q];
        S += c.v[i].at[value + p] * k.at[q];
        vec(after + at) = S;
        read_sum += S * r.at[q];
        next_sum += S * a.at[q];
      }
      read[p] = read_sum, next[p] = next_sum;
    }
  });
  return {sums_of_lanes(read), sums_of_lanes(next)};
}

// The state of one head takes whole vectors both ways, zeros beyond head_size.
static inline void unpack_values(float* padded, const float* dense, int64_t n, int64_t width) {
  unpack(padded, dense, n, width);
  std::memset(padded + n * width, 0, (width - n) * width * sizeof(float));
}

static void wkv7_turn(const WkvShape& shape, const Wkv7Inputs& in, const WkvOutputs& out,
                      const Head& head, float* S, int64_t first_token) {
  const int64_t n = head.head_size, width = head.width;
  const int64_t last_token = std::min(first_token + kForwardTurn, head.n_tokens);
  Wkv7Chunk c;
  Row y[kTokens];
  for (int64_t token = first_token; token < last_token; token += kTokens) {
    if (out.checkpoints && token % kCheckpointSpan == 0)
      pack(out.checkpoints + checkpoint_offset(shape, head, token), S, n, width);
    c.load(head, in, token);
    Wkv7Chunk::prefetch(head, in, token + kForwardTurn);
    const int n_tokens = static_cast<int>(head.rows(token));
    for (int64_t value = 0; value < width; value += LANES) {
      float* rows = S + value * width;
      Vec removed = products_with_rows(rows, c.a[0], width);
      for (int i = 0; i < n_tokens; ++i) {
        const Row& next_a = c.a[std::min(i + 1, n_tokens - 1)];
        const Wkv7Sums sums = wkv7_step(c, i, next_a, value, removed, rows, rows, width);
        y[i].vec(value) = sums.read;
        removed = sums.removed;
      }
    }
    head.store(y, out.y, token);
  }
}

static void wkv7_forward(const WkvShape& shape, const Wkv7Inputs& in, const WkvOutputs& out,
                         int64_t first, int64_t last) {
  DenormalsAreZero while_alive;
  const int64_t n = shape.head_size, width = padded_width(n), matrix = width * width;
  Scratch states(std::min(last - first, shape.n_heads) * matrix);
  for (int64_t begin = first, end; begin < last; begin = end) {
    end = std::min(last, (begin / shape.n_heads + 1) * shape.n_heads);  // of the sequence's heads
    const auto state = [&](int64_t index) { return states.data + (index - begin) * matrix; };
    for (int64_t index = begin; index < end; ++index)
      unpack_values(state(index), in.state + index * n * n, n, width);
    const int64_t n_tokens = Head(shape, begin).n_tokens;
    for (int64_t token = 0; token < n_tokens; token += kForwardTurn)
      for (int64_t index = begin; index < end; ++index)
        wkv7_turn(shape, in, out, Head(shape, index), state(index), token);
    for (int64_t index = begin; index < end; ++index)
      pack(out.state + index * n * n, state(index), n, width);
  }
}

// WKV7, token by token. Part of kernels.h.
//
//   S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t
//
// S has rows of keys, one for each value. Forward holds it transposed: the values lie in lanes, so
// that the sums over keys come out as vectors.

struct Wkv7Rows {
  Row r, k, v, decay, a, b;
  Row rate;  // -log decay

  void load(const Head& head, const Wkv7Inputs& in, int64_t token) {
    head.load(r, in.r, token);
    head.load(k, in.k, token);
    head.load(v, in.v, token);
    head.load(a, in.a, token);
    head.load(b, in.b, token);
    head.load(decay, in.w, token, kNoDecay);
    for (int64_t n = 0; n < head.width; n += LANES) {
      rate.vec(n) = exponential(at_most(80.0f, decay.vec(n))).value();
      decay.vec(n) = exponential(-rate.vec(n)).value();
    }
  }

  static void prefetch(const Head& head, const Wkv7Inputs& in, int64_t token) {
    for (const void* data : {in.r, in.k, in.v, in.w, in.a, in.b}) head.prefetch_row(data, token);
  }
};

// f(head size, width), known to the compiler for the head size of all released models.
template <typename F>
static inline __attribute__((always_inline)) void with_head_size(const Head& head, F f) {
  typedef std::integral_constant<int64_t, 64> Usual;
  head.head_size == Usual() ? f(Usual(), Usual()) : f(head.head_size, head.width);
}

// Tokens of a chunk, in order; S takes all of them. before_token(i) asks for what comes later.
template <typename HeadSize, typename Width, typename F>
static inline __attribute__((always_inline)) void wkv7_tokens(const Wkv7Rows* tokens, int n_tokens,
                                                              Row* y, float* S, HeadSize n,
                                                              Width width, F before_token) {
  for_columns(width, [&](auto vecs, int64_t column) __attribute__((always_inline)) {
    Vec removed[vecs] = {};  // S_{t-1} a_t
    for (int64_t key = 0; key < n; ++key)
#pragma GCC unroll 4
      for (int q = 0; q < vecs; ++q)
        removed[q] += tokens[0].a.at[key] * vec(S + key * width + column + q * LANES);
    for (int i = 0; i < n_tokens; ++i) {
      if (column == 0) before_token(i);
      const Wkv7Rows &x = tokens[i], &next = tokens[std::min(i + 1, n_tokens - 1)];
      Vec v[vecs], read[vecs] = {}, next_removed[vecs] = {};
#pragma GCC unroll 4
      for (int q = 0; q < vecs; ++q) v[q] = x.v.vec(column + q * LANES);
      for (int64_t key = 0; key < n; ++key) {
        const float d = x.decay.at[key], b = x.b.at[key], k = x.k.at[key];
        const float r = x.r.at[key], next_a = next.a.at[key];
#pragma GCC unroll 4
        for (int q = 0; q < vecs; ++q) {
          Vec& place = vec(S + key * width + column + q * LANES);
          Vec after = place * d;
          after += removed[q] * b;
          after += v[q] * k;
          place = after;
          read[q] += after * r;
          next_removed[q] += after * next_a;
        }
      }
#pragma GCC unroll 4
      for (int q = 0; q < vecs; ++q) {
        y[i].vec(column + q * LANES) = read[q];
        removed[q] = next_removed[q];
      }
    }
  });
}

// Square matrices of whole vectors, zeros beyond head_size.
static inline void unpack_square(float* padded, const float* dense, int64_t n, int64_t width) {
  unpack(padded, dense, n, width);
  std::memset(padded + n * width, 0, (width - n) * width * sizeof(float));
}

// States between their form in memory and S; `square` is scratch.
struct Wkv7State {
  float *S, *square;

  void load(const float* from, int64_t n, int64_t width) const {
    unpack_square(square, from, n, width);
    transpose(S, square, width);
  }

  void store(float* to, int64_t n, int64_t width) const {
    transpose(square, S, width);
    pack(to, square, n, width);
  }
};

static void wkv7_turn(const WkvShape& shape, const Wkv7Inputs& in, const WkvOutputs& out,
                      const Head& head, const Wkv7State& state, int64_t first_token) {
  const int64_t last_token = std::min(first_token + kForwardTurn, head.n_tokens);
  Wkv7Rows tokens[kTokens];
  Row y[kTokens];
  for (int64_t token = first_token; token < last_token; token += kTokens) {
    if (out.checkpoints && token % kCheckpointSpan == 0)
      state.store(out.checkpoints + checkpoint_offset(shape, head, token), head.head_size,
                  head.width);
    const int n_tokens = static_cast<int>(head.rows(token));
    for (int i = 0; i < n_tokens; ++i) tokens[i].load(head, in, token + i);
    const auto before_token = [&](int i) {
      const int64_t later = token + i + kForwardTurn;
      if (later < head.n_tokens) Wkv7Rows::prefetch(head, in, later);
    };
    with_head_size(head, [&](auto n, auto width) __attribute__((always_inline)) {
      wkv7_tokens(tokens, n_tokens, y, state.S, n, width, before_token);
    });
    head.store(y, out.y, token);
  }
}

static void wkv7_forward(const WkvShape& shape, const Wkv7Inputs& in, const WkvOutputs& out,
                         int64_t first, int64_t last) {
  DenormalsAreZero while_alive;
  const int64_t n = shape.head_size, width = padded_width(n), matrix = width * width;
  Scratch states(std::min(last - first, shape.n_heads) * matrix), square(matrix);
  for (int64_t begin = first, end; begin < last; begin = end) {
    end = std::min(last, (begin / shape.n_heads + 1) * shape.n_heads);  // of the sequence's heads
    const auto state = [&](int64_t index) {
      return Wkv7State{states.data + (index - begin) * matrix, square.data};
    };
    for (int64_t index = begin; index < end; ++index)
      state(index).load(in.state + index * n * n, n, width);
    const int64_t n_tokens = Head(shape, begin).n_tokens;
    for (int64_t token = 0; token < n_tokens; token += kForwardTurn)
      for (int64_t index = begin; index < end; ++index)
        wkv7_turn(shape, in, out, Head(shape, index), state(index), token);
    for (int64_t index = begin; index < end; ++index)
      state(index).store(out.state + index * n * n, n, width);
  }
}

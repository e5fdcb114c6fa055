// The backward pass of WKV7. Part of kernels.h.
//
// With G_t the gradient of S_t, dy_t r_t^T included, from the last token to the first:
//   dr = S_t^T dy    dv = G k    dk = G^T v    da = S_{t-1}^T (G b)    db = G^T (S_{t-1} a)
//   dd = sum over values of S_{t-1} G          G_{t-1} = G diag(d) + (G b) a^T
// The states come from those saved every kCheckpointSpan tokens, by the recurrence once more.
//
// S and G have rows of keys, one for each value, and no row needs another: LANES values pass
// through all tokens of a span together, one half after the other, so that the sums over the keys
// of one half are made while the other is computed.

constexpr int kBackwardVecs = LANES == 16 ? 2 : 1;  // of a row, of which ten are in registers
constexpr int kHalf = LANES / 2;
constexpr int64_t kTokensAhead = 8;  // from a prefetch to the use

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

struct Wkv7Token : Wkv7Rows {
  Row dy, dr, dk, dv, dw, da, db;
  Row removed, of_removed;  // S_{t-1} a_t, and its gradient

  void load(const Head& head, const Wkv7Inputs& in, const void* gradient_of_y, int64_t token) {
    Wkv7Rows::load(head, in, token);
    head.load(dy, gradient_of_y, token);
    for (Row* row : {&dr, &dk, &dw, &da, &db}) std::memset(row->at, 0, head.width * sizeof(float));
  }

  static void prefetch(const Head& head, const Wkv7Inputs& in, const void* gradient_of_y,
                       int64_t token) {
    Wkv7Rows::prefetch(head, in, token);
    head.prefetch_row(gradient_of_y, token);
  }

  // dw holds the gradient of the decay so far.
  void store(const Head& head, const Wkv7Gradients& out, int64_t token) {
    for (int64_t n = 0; n < head.width; n += LANES)  // w = log(-log d)
      dw.vec(n) *= -decay.vec(n) * rate.vec(n);
    head.store(dr, out.r, token);
    head.store(dk, out.k, token);
    head.store(dv, out.v, token);
    head.store(dw, out.w, token);
    head.store(da, out.a, token);
    head.store(db, out.b, token);
  }

  static void prefetch_for_store(const Head& head, const Wkv7Gradients& out, int64_t token) {
    for (const void* data : {out.r, out.k, out.v, out.w, out.a, out.b})
      head.prefetch_row<For::kWriting>(data, token);
  }

  void change_nothing() {
    std::memset(this, 0, sizeof *this);
    std::fill(decay.at, decay.at + kRowStride, 1.0f);
  }
};

static inline void set_half(Row& row, int64_t value, const float* sums) {
  std::memcpy(row.at + value, sums, kHalf * sizeof(float));
}

// S a of LANES values, from `value` on.
template <typename Width>
static inline __attribute__((always_inline)) void wkv7_first_removed(Wkv7Token& x, const float* S,
                                                                     int64_t value, Width width) {
  Vec sums[LANES];
#pragma GCC unroll 16
  for (int p = 0; p < LANES; ++p) sums[p] = Vec{};
  for_columns(width, [&](auto vecs, int64_t column) __attribute__((always_inline)) {
    const Part<vecs> a(x.a, column);
    for (int p = 0; p < LANES; ++p)
#pragma GCC unroll 4
      for (int q = 0; q < vecs; ++q) sums[p] += vec(S + p * width + column + q * LANES) * a.at[q];
  });
  x.removed.vec(value) = sums_of_lanes(sums);
}

// kHalf values, the first of them `value`, from before token x to after it; sets the next token's
// `removed`.
template <typename Width>
static inline __attribute__((always_inline)) void wkv7_step(Wkv7Token* x, const float* before,
                                                            float* after, int64_t value,
                                                            Width width) {
  Vec sums[kHalf];
#pragma GCC unroll 8
  for (int p = 0; p < kHalf; ++p) sums[p] = Vec{};
  for_columns(width, [&](auto vecs, int64_t column) __attribute__((always_inline)) {
    const Part<vecs> decay(x->decay, column), b(x->b, column), k(x->k, column), a(x[1].a, column);
    for (int p = 0; p < kHalf; ++p) {
      Vec sum = sums[p];
#pragma GCC unroll 4
      for (int q = 0; q < vecs; ++q) {
        const int64_t at = p * width + column + q * LANES;
        Vec S = vec(before + at) * decay.at[q];
        S += x->removed.at[value + p] * b.at[q];
        S += x->v.at[value + p] * k.at[q];
        vec(after + at) = S;
        sum += S * a.at[q];
      }
      sums[p] = sum;
    }
  });
  float removed[LANES];
  const Vec total = sums_of_lanes<kHalf>(sums);
  std::memcpy(removed, &total, sizeof total);
  set_half(x[1].removed, value, removed);
}

// kHalf values, from the token after x to x, between which the state is S: G goes from the gradient
// of the state after x[1] to that of the state after x. These values' shares are added to dr, dk,
// db of x and to da, dd (in dw) of x[1]; dv and of_removed of x are theirs alone.
template <typename Width>
static inline __attribute__((always_inline)) void wkv7_step_back(Wkv7Token* x, const float* S,
                                                                 float* G, int64_t value,
                                                                 Width width) {
  Vec sums[LANES];  // G k, then G b
#pragma GCC unroll 16
  for (int p = 0; p < LANES; ++p) sums[p] = Vec{};
  for_columns<kBackwardVecs>(width, [&](auto vecs, int64_t column) __attribute__((always_inline)) {
    const Part<vecs> decay(x[1].decay, column), a(x[1].a, column);
    const Part<vecs> r(x->r, column), k(x->k, column), b(x->b, column);
    Vec dr[vecs] = {}, dk[vecs] = {}, db[vecs] = {}, dd[vecs] = {}, da[vecs] = {};
    for (int p = 0; p < kHalf; ++p) {
      const float dy = x->dy.at[value + p], v = x->v.at[value + p];
      const float removed = x->removed.at[value + p], later = x[1].of_removed.at[value + p];
      Vec with_k = sums[p], with_b = sums[kHalf + p];
#pragma GCC unroll 2
      for (int q = 0; q < vecs; ++q) {
        const int64_t at = p * width + column + q * LANES;
        const Vec between = vec(S + at);
        Vec g = vec(G + at);
        dd[q] += between * g;
        da[q] += later * between;
        dr[q] += dy * between;
        g *= decay.at[q];
        g += later * a.at[q];
        g += dy * r.at[q];
        vec(G + at) = g;
        with_k += g * k.at[q];
        with_b += g * b.at[q];
        dk[q] += v * g;
        db[q] += removed * g;
      }
      sums[p] = with_k, sums[kHalf + p] = with_b;
    }
#pragma GCC unroll 2
    for (int q = 0; q < vecs; ++q) {
      const int64_t n = column + q * LANES;
      x->dr.vec(n) += dr[q];
      x->dk.vec(n) += dk[q];
      x->db.vec(n) += db[q];
      x[1].dw.vec(n) += dd[q];
      x[1].da.vec(n) += da[q];
    }
  });
  float both[LANES];
  const Vec total = sums_of_lanes(sums);
  std::memcpy(both, &total, sizeof total);
  set_half(x->dv, value, both);
  set_half(x->of_removed, value, both + kHalf);
}

// What one thread works on: a span of tokens of one head, between two that change nothing.
struct Wkv7Span {
  const Wkv7Inputs& in;
  const WkvOutputGradients& from;
  const Wkv7Gradients& out;
  Scratch states, G;
  const std::unique_ptr<Wkv7Token[]> memory;
  Wkv7Token* const tokens;

  Wkv7Span(const Wkv7Inputs& in, const WkvOutputGradients& from, const Wkv7Gradients& out,
           int64_t width)
      : in(in),
        from(from),
        out(out),
        states((kCheckpointSpan + 1) * LANES * width),
        G(width * width),
        memory(new Wkv7Token[kCheckpointSpan + 2]),
        tokens(memory.get() + 1) {
    tokens[-1].change_nothing();
  }

  // The tokens are read as the first values need them, so that computing hides the reading, ...
  void load(const Head& head, int64_t first, int64_t t, int64_t n_tokens) {
    if (t + kTokensAhead < n_tokens)
      Wkv7Token::prefetch(head, in, from.y, first + t + kTokensAhead);
    if (t < n_tokens) tokens[t].load(head, in, from.y, first + t);
  }

  // ... and written when the last values have passed. The span before this one comes next.
  void store(const Head& head, int64_t first, int64_t t) {
    if (t >= kTokensAhead)
      Wkv7Token::prefetch_for_store(head, out, first + t - kTokensAhead);
    else if (first > 0)
      Wkv7Token::prefetch(head, in, from.y, first - kCheckpointSpan + t);
    tokens[t].store(head, out, first + t);
  }

  // LANES values, from `value` on, over the tokens from `first` on; `saved` holds the state before
  // those.
  template <typename Width>
  void pass(const Head& head, int64_t first, int64_t n_tokens, int64_t value, const float* saved,
            Width width) {
    const int64_t n = head.head_size, rows = LANES * width, half = kHalf * width;
    const bool reads = value == 0, writes = value + LANES >= width;
    float* gradient = G.data + value * width;
    std::memset(states.data, 0, rows * sizeof(float));
    unpack_rows(states.data, saved + value * n, std::min<int64_t>(LANES, n - value), n, width);
    if (reads) load(head, first, 0, n_tokens);
    wkv7_first_removed(tokens[0], states.data, value, width);
    for (int64_t t = 0; t < n_tokens; ++t) {
      if (reads) load(head, first, t + 1, n_tokens);
      float* S = states.data + t * rows;
      wkv7_step(tokens + t, S, S + rows, value, width);
      wkv7_step(tokens + t, S + half, S + rows + half, value + kHalf, width);
    }
    for (int64_t t = n_tokens - 1; t >= -1; --t) {
      const float* S = states.data + (t + 1) * rows;
      wkv7_step_back(tokens + t, S, gradient, value, width);
      wkv7_step_back(tokens + t, S + half, gradient + half, value + kHalf, width);
      if (writes && t + 1 < n_tokens) store(head, first, t + 1);
    }
  }
};

static void wkv7_backward(const WkvShape& shape, const Wkv7Inputs& in, const float* checkpoints,
                          const WkvOutputGradients& from, const Wkv7Gradients& out, int64_t first,
                          int64_t last) {
  DenormalsAreZero while_alive;
  const int64_t n = shape.head_size, width = padded_width(n);
  Wkv7Span span(in, from, out, width);
  for (int64_t index = first; index < last; ++index) {
    const Head head(shape, index);
    unpack_square(span.G.data, from.state + index * n * n, n, width);
    const int64_t n_spans = (head.n_tokens + kCheckpointSpan - 1) / kCheckpointSpan;
    for (int64_t i = n_spans - 1; i >= 0; --i) {
      const int64_t token = i * kCheckpointSpan;
      const int64_t n_tokens = std::min(kCheckpointSpan, head.n_tokens - token);
      const float* saved = checkpoints + checkpoint_offset(shape, head, token);
      span.tokens[n_tokens].change_nothing();
      with_head_size(head, [&](auto, auto columns) {
        for (int64_t value = 0; value < width; value += LANES)
          span.pass(head, token, n_tokens, value, saved, columns);
      });
    }
    pack(out.state + index * n * n, span.G.data, n, width);
  }
}

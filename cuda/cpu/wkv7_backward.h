// The backward pass of WKV7. Part of kernels.h.
//
// With G_t the gradient of S_t, dy_t r_t^T included, from the last token to the first:
//   dr = S_t^T dy    dv = G k    dk = G^T v    da = S_{t-1}^T (G b)    db = G^T (S_{t-1} a)
//   dd = sum over values of S_{t-1} G          G_{t-1} = G diag(d) + (G b) a^T
// The states come from those saved every kCheckpointSpan tokens, by the recurrence once more.

constexpr int kBackwardVecs = LANES == 16 ? 2 : 1;  // of a row, of which ten are in registers
constexpr int kSpanChunks = kCheckpointSpan / kTokens;

struct Wkv7ChunkGradients {
  Row dy[kTokens], dr[kTokens], dk[kTokens], dv[kTokens], dw[kTokens], da[kTokens], db[kTokens];
};

// What one thread works on: a span of tokens.
struct Wkv7Span {
  Wkv7Chunk chunks[kSpanChunks], neutral = {};
  Wkv7ChunkGradients gradients[kSpanChunks], ignored = {};
  Vec removed[kCheckpointSpan + 1];  // S_{t-1} a_t of LANES values

  // Its tokens lie between two that change nothing.
  Wkv7Span() { std::fill(neutral.decay[0].at, neutral.decay[0].at + kRowStride, 1.0f); }
};

struct Wkv7Token {
  const Row &r, &k, &v, &decay, &a, &b, &dy;
  Row &dr, &dk, &dv, &dw, &da, &db;

  Wkv7Token(const Wkv7Chunk& c, Wkv7ChunkGradients& g, int64_t i)
      : r(c.r[i]),
        k(c.k[i]),
        v(c.v[i]),
        decay(c.decay[i]),
        a(c.a[i]),
        b(c.b[i]),
        dy(g.dy[i]),
        dr(g.dr[i]),
        dk(g.dk[i]),
        dv(g.dv[i]),
        dw(g.dw[i]),
        da(g.da[i]),
        db(g.db[i]) {}

  static Wkv7Token at(Wkv7Span& span, int64_t t, int64_t n_tokens) {
    if (t < 0 || t >= n_tokens) return {span.neutral, span.ignored, 0};
    return {span.chunks[t / kTokens], span.gradients[t / kTokens], t % kTokens};
  }
};

// One step of LANES values, from the token `later` to x before it. G goes from the gradient of the
// state after `later` to that of the state after x. `of_removed` is G b of `later`; returns that of
// x. dr, dk, db, dd (in dw) and the later token's da get these values' shares; dv is theirs alone.
static inline Vec wkv7_step_back(const Wkv7Token& later, const Wkv7Token& x, Vec of_removed,
                                 Vec removed, int64_t value, const float* before,
                                 const float* after, float* G, int64_t width) {
  alignas(64) float by[LANES], by_later[LANES];
  vec(by) = removed;
  vec(by_later) = of_removed;
  Vec v_sums[LANES] = {}, removed_sums[LANES] = {};
  for_columns<kBackwardVecs>(width, [&](auto vecs, int64_t column) __attribute__((always_inline)) {
    const Part<vecs> decay(later.decay, column), a(later.a, column);
    const Part<vecs> r(x.r, column), k(x.k, column), b(x.b, column);
    Vec dr[vecs] = {}, dk[vecs] = {}, db[vecs] = {}, dd[vecs] = {}, da[vecs] = {};
    for (int p = 0; p < LANES; ++p) {
      const float dy = x.dy.at[value + p], v = x.v.at[value + p];
      Vec v_sum = v_sums[p], removed_sum = removed_sums[p];
      for (int q = 0; q < vecs; ++q) {
        const int64_t at = p * width + column + q * LANES;
        const Vec S = vec(after + at);
        da[q] += by_later[p] * S;
        Vec g = vec(G + at) * decay.at[q];
        g += by_later[p] * a.at[q];
        g += dy * r.at[q];
        vec(G + at) = g;
        v_sum += g * k.at[q];
        removed_sum += g * b.at[q];
        dr[q] += dy * S;
        dk[q] += v * g;
        db[q] += by[p] * g;
        dd[q] += vec(before + at) * g;
      }
      v_sums[p] = v_sum, removed_sums[p] = removed_sum;
    }
    for (int q = 0; q < vecs; ++q) {
      const int64_t n = column + q * LANES;
      x.dr.vec(n) += dr[q];
      x.dk.vec(n) += dk[q];
      x.db.vec(n) += db[q];
      x.dw.vec(n) += dd[q];
      later.da.vec(n) += da[q];
    }
  });
  x.dv.vec(value) = sums_of_lanes(v_sums);
  return sums_of_lanes(removed_sums);
}

// LANES values over a span of tokens: `states` holds theirs before its first token, in the first of
// n_tokens + 1 places.
static inline void wkv7_span_values(Wkv7Span& span, int64_t n_tokens, int64_t value, float* states,
                                    float* G, int64_t width) {
  const int64_t rows = LANES * width;
  span.removed[0] = products_with_rows(states, span.chunks[0].a[0], width);
  for (int64_t t = 0; t < n_tokens; ++t) {
    float* S = states + t * rows;
    const Row& next_a = Wkv7Token::at(span, t + 1, n_tokens).a;
    span.removed[t + 1] = wkv7_step(span.chunks[t / kTokens], t % kTokens, next_a, value,
                                    span.removed[t], S, S + rows, width)
                              .removed;
  }
  Vec of_removed = {};
  for (int64_t t = n_tokens - 1; t >= -1; --t) {
    const float* after = states + (t + 1) * rows;
    const float* before = states + std::max<int64_t>(t, 0) * rows;
    of_removed = wkv7_step_back(
        Wkv7Token::at(span, t + 1, n_tokens), Wkv7Token::at(span, t, n_tokens), of_removed,
        span.removed[std::max<int64_t>(t, 0)], value, before, after, G, width);
  }
}

static void wkv7_load_span(Wkv7Span& span, const Head& head, const Wkv7Inputs& in, const void* dy,
                           int64_t first, int64_t n_tokens) {
  for (int64_t t = 0; t < n_tokens; t += kTokens) {
    Wkv7ChunkGradients& g = span.gradients[t / kTokens];
    span.chunks[t / kTokens].load(head, in, first + t);
    head.load(g.dy, dy, first + t);
    for (Row* rows : {g.dr, g.dk, g.dw, g.da, g.db}) std::memset(rows, 0, sizeof g.dr);
  }
}

static void wkv7_store_span(Wkv7Span& span, const Head& head, const Wkv7Gradients& out,
                            int64_t first, int64_t n_tokens) {
  for (int64_t t = 0; t < n_tokens; t += kTokens) {
    const Wkv7Chunk& c = span.chunks[t / kTokens];
    Wkv7ChunkGradients& g = span.gradients[t / kTokens];
    for (int64_t i = 0; i < head.rows(first + t); ++i)  // w = log(-log d)
      for (int64_t n = 0; n < head.width; n += LANES)
        g.dw[i].vec(n) *= -c.decay[i].vec(n) * c.rate[i].vec(n);
    head.store(g.dr, out.r, first + t);
    head.store(g.dk, out.k, first + t);
    head.store(g.dv, out.v, first + t);
    head.store(g.dw, out.w, first + t);
    head.store(g.da, out.a, first + t);
    head.store(g.db, out.b, first + t);
  }
}

static void wkv7_backward_head(const WkvShape& shape, const Wkv7Inputs& in,
                               const float* checkpoints, const WkvOutputGradients& from,
                               const Wkv7Gradients& out, int64_t index, Wkv7Span& span,
                               float* states, float* G) {
  const Head head(shape, index);
  const int64_t n = head.head_size, width = head.width;
  unpack_values(G, from.state + index * n * n, n, width);
  const int64_t n_spans = (head.n_tokens + kCheckpointSpan - 1) / kCheckpointSpan;
  for (int64_t i = n_spans - 1; i >= 0; --i) {
    const int64_t first = i * kCheckpointSpan;
    const int64_t n_tokens = std::min(kCheckpointSpan, head.n_tokens - first);
    const float* saved = checkpoints + checkpoint_offset(shape, head, first);
    wkv7_load_span(span, head, in, from.y, first, n_tokens);
    for (int64_t value = 0; value < width; value += LANES) {
      std::memset(states, 0, LANES * width * sizeof(float));
      unpack_rows(states, saved + value * n, std::min<int64_t>(LANES, n - value), n, width);
      wkv7_span_values(span, n_tokens, value, states, G + value * width, width);
    }
    wkv7_store_span(span, head, out, first, n_tokens);
  }
  pack(out.state + index * n * n, G, n, width);
}

static void wkv7_backward(const WkvShape& shape, const Wkv7Inputs& in, const float* checkpoints,
                          const WkvOutputGradients& from, const Wkv7Gradients& out, int64_t first,
                          int64_t last) {
  DenormalsAreZero while_alive;
  const int64_t width = padded_width(shape.head_size);
  Scratch states((kCheckpointSpan + 1) * LANES * width), G(width * width);
  const std::unique_ptr<Wkv7Span> span(new Wkv7Span);
  for (int64_t index = first; index < last; ++index)
    wkv7_backward_head(shape, in, checkpoints, from, out, index, *span, states.data, G.data);
}

// The backward pass. Part of kernels.h.

struct ChunkGradients {
  Row dy[kTokens], dr[kTokens], dk[kTokens], dv[kTokens], dw[kTokens];
  Row through;  // gradient of log kept, the path from the state before to the state after
};

// Columns n .. n + LANES of dr, dk, dw, and their share of du. On entry dr and dk hold the parts
// that pass through the state, without the factors `before` and `after`.
static inline Vec finish_key_gradients(ChunkGradients& g, const Chunk& c, const Pairs dA, Vec u,
                                       int64_t n) {
  Vec dr[kTokens], dk[kTokens], dlog[kTokens], du = {};
  for (int i = 0; i < kTokens; ++i) {
    dr[i] = g.dr[i].vec(n) * c.before[i].vec(n);
    dk[i] = g.dk[i].vec(n) * c.after[i].vec(n);
    dlog[i] = g.through.vec(n);
  }
  Vec later = {}, earlier = {};  // a decay lies between the state and all later readers,
  for (int t = kTokens - 1; t >= 0; --t) {
    dlog[t] += later;
    later += c.r[t].vec(n) * dr[t];
  }
  for (int t = 0; t < kTokens; ++t) {  // between all earlier writers and the state,
    dlog[t] += earlier;
    earlier += c.k[t].vec(n) * dk[t];
  }
  for (int j = 0; j < kTokens; ++j) {  // and between the earlier and the later token of a pair
    Vec product = Vec{} + 1.0f, pair[kTokens];
    for (int i = j + 1; i < kTokens; ++i) {
      Vec weight = dA[i][j] * product;
      dr[i] += weight * c.k[j].vec(n);
      dk[j] += weight * c.r[i].vec(n);
      pair[i] = weight * c.k[j].vec(n) * c.r[i].vec(n);
      product *= c.decay[i].vec(n);
    }
    Vec later_pairs = {};
    for (int t = kTokens - 2; t > j; --t) {
      later_pairs += pair[t + 1];
      dlog[t] += later_pairs;
    }
  }
  for (int i = 0; i < kTokens; ++i) {
    Vec r = c.r[i].vec(n), k = c.k[i].vec(n);
    g.dr[i].vec(n) = dr[i] + dA[i][i] * u * k;
    g.dk[i].vec(n) = dk[i] + dA[i][i] * u * r;
    g.dw[i].vec(n) = dlog[i] * c.log_decay[i].vec(n);
    du += dA[i][i] * r * k;
  }
  return du;
}

// Gradients of one chunk from St before it and G after it; G and Gt move on to before the chunk.
static inline void backward_chunk(ChunkGradients& g, const Chunk& c, const Row& u, Row& du,
                                  const float* St, float* G, float* Gt, int64_t n, int64_t width) {
  Pairs A, dA;
  weigh_pairs(A, c, u, width);
  weigh_pair_gradients(dA, g.dy, c.v, width);
  products_over_rows(g.through.at, St, Gt, n, width);
  for (int64_t m = 0; m < width; m += LANES) g.through.vec(m) *= c.kept.vec(m);
  multiply(g.dr, g.dy, St, n, width);
  multiply(g.dk, c.v, Gt, n, width);
  multiply_with_pairs<Of::kEarlierToken>(g.dv, c.writer, G, A, g.dy, n, width);
  advance<Keys::kColumns>(Gt, Gt, c.lost.at, g.dy, c.reader, n, width);
  advance<Keys::kRows>(G, G, c.lost.at, c.reader, g.dy, n, width);
  for (int64_t m = 0; m < width; m += LANES)
    du.vec(m) += finish_key_gradients(g, c, dA, u.vec(m), m);
}

// Matrices of one thread: G and its transpose, and S transposed before each chunk of a span.
struct BackwardScratch {
  Scratch G, Gt, St;
  explicit BackwardScratch(int64_t matrix)
      : G(matrix), Gt(matrix), St(kCheckpointSpan / kTokens * matrix) {}
};

static void backward_head(const WkvShape& shape, const Wkv6Inputs& in, const float* checkpoints,
                          const WkvOutputGradients& from, const Wkv6Gradients& out, int64_t index,
                          BackwardScratch& scratch) {
  Head head(shape, index);
  const int64_t n = head.head_size, width = head.width, matrix = n * width;
  float *G = scratch.G.data, *Gt = scratch.Gt.data, *St = scratch.St.data;
  Chunk c;
  ChunkGradients g;
  Row u = {}, du = {};
  std::memcpy(u.at, in.u + head.offset, n * sizeof(float));
  unpack(G, from.state + index * n * n, n, width);
  unpack_transposed(Gt, from.state + index * n * n, n, width);

  const int64_t n_spans = (head.n_tokens + kCheckpointSpan - 1) / kCheckpointSpan;
  for (int64_t span = n_spans - 1; span >= 0; --span) {
    const int64_t first = span * kCheckpointSpan;
    const int64_t n_tokens = std::min(kCheckpointSpan, head.n_tokens - first);
    const int64_t n_chunks = (n_tokens + kTokens - 1) / kTokens;
    unpack_transposed(St, checkpoints + checkpoint_offset(shape, head, first), n, width);
    for (int64_t chunk = 0; chunk + 1 < n_chunks; ++chunk) {
      c.load<false>(head, in, first + chunk * kTokens);
      Chunk::prefetch(head, in, first + (chunk + 1) * kTokens);
      float* S = St + chunk * matrix;
      advance<Keys::kColumns>(S + matrix, S, c.lost.at, c.v, c.writer, n, width);
    }
    for (int64_t chunk = n_chunks - 1; chunk >= 0; --chunk) {
      const int64_t token = first + chunk * kTokens;
      c.load<true>(head, in, token);
      head.load(g.dy, from.y, token);
      Chunk::prefetch(head, in, token - kTokens);
      head.prefetch(from.y, token - kTokens);
      backward_chunk(g, c, u, du, St + chunk * matrix, G, Gt, n, width);
      head.store(g.dr, out.r, token);
      head.store(g.dk, out.k, token);
      head.store(g.dv, out.v, token);
      head.store(g.dw, out.w, token);
    }
  }
  pack(out.state + index * n * n, G, n, width);
  std::memcpy(out.u + index * n, du.at, n * sizeof(float));
}

static void wkv6_backward(const WkvShape& shape, const Wkv6Inputs& in, const float* checkpoints,
                          const WkvOutputGradients& from, const Wkv6Gradients& out, int64_t first,
                          int64_t last) {
  DenormalsAreZero while_alive;
  BackwardScratch scratch(shape.head_size * padded_width(shape.head_size));
  for (int64_t index = first; index < last; ++index)
    backward_head(shape, in, checkpoints, from, out, index, scratch);
}

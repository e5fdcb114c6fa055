// The CPU kernel, written once on GCC's vector types and included once for each instruction set,
// in a namespace that defines LANES, the number of floats in a register. See docs/kernels.md.
//
// Tokens are taken in chunks of kTokens. Inside a chunk each pair of tokens is weighed directly;
// what crosses a chunk goes through the state. With d the decays of a chunk's tokens:
//   before_i = product of d_l, l < i     after_j = product of d_l, l > j     kept = product of all
//   A_ij = sum_n r_i k_j prod(d_l, j < l < i) for j < i,      A_ii = sum_n r_i u k_i
//   y = A V + (r*before) S        S' = kept*S + (k*after)^T V
// Backward runs the chunks in reverse with G, the gradient of the state at the chunk's end. All
// factors are products of decays, so they lie in [0, 1]: no overflow, and no difference of large
// sums anywhere.

typedef float Vec __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));

constexpr int kTokens = 8;                       // tokens of a chunk
constexpr int kRegisters = LANES == 16 ? 2 : 1;  // vectors per row whose sums stay in registers

struct alignas(64) Row {
  float at[kMaxHeadSize];
  Vec& vec(int64_t n) { return *reinterpret_cast<Vec*>(at + n); }
  const Vec& vec(int64_t n) const { return *reinterpret_cast<const Vec*>(at + n); }
};

static inline Vec& vec(float* p) { return *reinterpret_cast<Vec*>(p); }
static inline const Vec& vec(const float* p) { return *reinterpret_cast<const Vec*>(p); }

template <int kLanes>
static inline float sum_lanes(const float* lane) {
  float halved[kLanes / 2];
  for (int l = 0; l < kLanes / 2; ++l) halved[l] = lane[l] + lane[l + kLanes / 2];
  return sum_lanes<kLanes / 2>(halved);
}

template <>
inline float sum_lanes<1>(const float* lane) {
  return *lane;
}

static inline float sum(Vec x) {
  float lane[LANES];
  std::memcpy(lane, &x, sizeof x);
  return sum_lanes<LANES>(lane);
}

// e^x = scale + scale * rest, with scale a power of two: keeps e^x - 1 precise near x = 0.
struct Exponential {
  Vec scale, rest;
  Vec value() const { return scale + scale * rest; }
  Vec minus_one() const { return (scale - 1.0f) + scale * rest; }
};

static inline Exponential exponential(Vec x) {
  const float kLowest = -87.0f, kHighest = 80.0f;  // stays clear of denormals and of infinity
  const float kRound = 12582912.0f;                // 1.5 * 2^23: adding it rounds to an integer
  x = x < kLowest ? Vec{} + kLowest : x;
  x = x > kHighest ? Vec{} + kHighest : x;
  Vec shifted = x * 1.44269504f + kRound;
  Vec n = shifted - kRound;
  Vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2, with ln 2 in two parts
  Vec series = 1.0f / 5040 * f + 1.0f / 720;
  series = series * f + 1.0f / 120;
  series = series * f + 1.0f / 24;
  series = series * f + 1.0f / 6;
  series = series * f + 0.5f;
  IntVec exponent = ((IntVec)shifted << 23) + (127 << 23);  // n stands in the low bits of `shifted`
  return {(Vec)exponent, series * f * f + f};
}

static inline void copy(float* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) std::memcpy(to + i, from + i, 8 * sizeof(float));
}

// Token rows in memory are fp32 or bf16, the upper half of an fp32.
static inline void load_row(float* row, const void* data, Element element, int64_t at, int64_t n) {
  if (element == Element::kFloat32) {
    copy(row, static_cast<const float*>(data) + at, n);
    return;
  }
  const uint16_t* source = static_cast<const uint16_t*>(data) + at;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits = static_cast<uint32_t>(source[i]) << 16;
    std::memcpy(row + i, &bits, sizeof bits);
  }
}

static inline void store_row(const float* row, void* data, Element element, int64_t at, int64_t n) {
  if (element == Element::kFloat32) {
    copy(static_cast<float*>(data) + at, row, n);
    return;
  }
  uint16_t* target = static_cast<uint16_t*>(data) + at;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, row + i, sizeof bits);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    target[i] = nan ? 0x7fc0 : nearest_even;
  }
}

// A head's row in whole vectors. Lanes past head_size hold zeros, so that no loop needs a tail.
static inline int64_t padded_width(int64_t head_size) {
  return (head_size + LANES - 1) / LANES * LANES;
}

// One head of one sequence: where its tokens lie.
struct Head {
  int64_t sequence, head_size, width, first_token, n_tokens, token_stride, offset;
  Element element;

  Head(const Wkv6Shape& shape, int64_t index)
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

  void load(Row* rows_out, const void* data, int64_t token) const {
    for (int64_t i = 0; i < kTokens; ++i) {
      const int64_t loaded = i < rows(token) ? head_size : 0;
      load_row(rows_out[i].at, data, element, position(token + i), loaded);
      for (int64_t n = loaded; n < width; n += 8) std::memset(rows_out[i].at + n, 0, 32);
    }
  }

  // Asks for the rows of a chunk ahead of their use; rows lie too far apart for the processor to
  // see them coming.
  void prefetch(const void* data, int64_t token) const {
    if (token < 0) return;
    const int64_t size = element == Element::kFloat32 ? 4 : 2;
    for (int64_t i = 0; i < rows(token); ++i) {
      const char* row = static_cast<const char*>(data) + position(token + i) * size;
      for (int64_t byte = 0; byte < head_size * size; byte += 64) __builtin_prefetch(row + byte);
    }
  }

  void store(const Row* rows_in, void* data, int64_t token) const {
    for (int64_t i = 0; i < rows(token); ++i)
      store_row(rows_in[i].at, data, element, position(token + i), head_size);
  }
};

// The rows of one chunk. Tokens past the end of a sequence have zero rows and decay nothing.
struct Chunk {
  Row r[kTokens], k[kTokens], v[kTokens];
  Row log_decay[kTokens], decay[kTokens], before[kTokens], after[kTokens];
  Row reader[kTokens], writer[kTokens];  // r * before, k * after
  Row kept, lost;                    // lost = 1 - kept, precise where the decay is slow

  void load(const Head& head, const Wkv6Inputs& in, int64_t token) {
    head.load(r, in.r, token);
    head.load(k, in.k, token);
    head.load(v, in.v, token);
    head.load(log_decay, in.w, token);
    for (int64_t n = 0; n < head.width; n += LANES) set_decays(n, head.rows(token));
  }

  static void prefetch(const Head& head, const Wkv6Inputs& in, int64_t token) {
    for (const void* data : {in.r, in.k, in.v, in.w}) head.prefetch(data, token);
  }

  void set_decays(int64_t n, int64_t rows) {
    Vec total = {}, product = Vec{} + 1.0f;
    for (int64_t i = 0; i < kTokens; ++i) {
      Vec rate = i < rows ? exponential(log_decay[i].vec(n)).value() : Vec{};
      log_decay[i].vec(n) = -rate;
      decay[i].vec(n) = exponential(-rate).value();
      total -= rate;
      before[i].vec(n) = product;
      reader[i].vec(n) = r[i].vec(n) * product;
      product *= decay[i].vec(n);
    }
    kept.vec(n) = exponential(total).value();
    lost.vec(n) = -exponential(total).minus_one();
    product = Vec{} + 1.0f;
    for (int64_t j = kTokens - 1; j >= 0; --j) {
      after[j].vec(n) = product;
      writer[j].vec(n) = k[j].vec(n) * product;
      product *= decay[j].vec(n);
    }
  }
};

// out_i = sum_p a_i[p] X[p] for the chunk's rows i; X is (n, width).
template <int kVecs>
static inline void multiply_columns(Row* out, const Row* a, const float* X, int64_t n,
                                    int64_t width, int64_t column) {
  Vec sums[kTokens][kVecs] = {};
  for (int64_t p = 0; p < n; ++p) {
    const float* x = X + p * width + column;
    for (int i = 0; i < kTokens; ++i)
      for (int q = 0; q < kVecs; ++q) sums[i][q] += a[i].at[p] * vec(x + q * LANES);
  }
  for (int i = 0; i < kTokens; ++i)
    for (int q = 0; q < kVecs; ++q) out[i].vec(column + q * LANES) = sums[i][q];
}

static inline void multiply(Row* out, const Row* a, const float* X, int64_t n, int64_t width) {
  int64_t column = 0;
  for (; column + kRegisters * LANES <= width; column += kRegisters * LANES)
    multiply_columns<kRegisters>(out, a, X, n, width, column);
  for (; column < width; column += LANES) multiply_columns<1>(out, a, X, n, width, column);
}

enum class Keys { kRows, kColumns };  // which way the keys run in a state matrix

// to[p] = (1 - lost) * from[p] + sum_i a_i[p] z_i, both (n, width); `lost` belongs to the keys.
template <Keys keys, int kVecs>
static inline void advance_columns(float* to, const float* from, const Row& lost, const Row* a,
                                   const Row* z, int64_t n, int64_t width, int64_t column) {
  for (int64_t p = 0; p < n; ++p) {
    int64_t at = p * width + column;
    for (int q = 0; q < kVecs; ++q) {
      Vec x = vec(from + at + q * LANES);
      Vec change = keys == Keys::kRows ? -lost.at[p] * x : -lost.vec(column + q * LANES) * x;
      for (int i = 0; i < kTokens; ++i) change += a[i].at[p] * z[i].vec(column + q * LANES);
      vec(to + at + q * LANES) = x + change;  // a large x is rounded once in a chunk
    }
  }
}

template <Keys keys>
static inline void advance(float* to, const float* from, const Row& lost, const Row* a,
                           const Row* z, int64_t n, int64_t width) {
  int64_t column = 0;
  for (; column + kRegisters * LANES <= width; column += kRegisters * LANES)
    advance_columns<keys, kRegisters>(to, from, lost, a, z, n, width, column);
  for (; column < width; column += LANES)
    advance_columns<keys, 1>(to, from, lost, a, z, n, width, column);
}

typedef float Pairs[kTokens][kTokens];  // [later token i][earlier token j], j <= i

// A_ij of the chunk: how much of token j's value token i reads.
static inline void weigh_pairs(Pairs A, const Chunk& c, const Row& u, int64_t width) {
  for (int j = 0; j < kTokens; ++j) {
    Vec sums[kTokens] = {};
    for (int64_t n = 0; n < width; n += LANES) {
      Vec kept_k = c.k[j].vec(n);
      sums[j] += c.r[j].vec(n) * u.vec(n) * kept_k;
      for (int i = j + 1; i < kTokens; ++i) {
        sums[i] += c.r[i].vec(n) * kept_k;
        kept_k *= c.decay[i].vec(n);
      }
    }
    for (int i = j; i < kTokens; ++i) A[i][j] = sum(sums[i]);
  }
}

// Gradient of A: dA_ij = dy_i . v_j.
static inline void weigh_pair_gradients(Pairs dA, const Row* dy, const Row* v, int64_t width) {
  for (int j = 0; j < kTokens; ++j) {
    Vec sums[kTokens] = {};
    for (int64_t n = 0; n < width; n += LANES)
      for (int i = j; i < kTokens; ++i) sums[i] += dy[i].vec(n) * v[j].vec(n);
    for (int i = j; i < kTokens; ++i) dA[i][j] = sum(sums[i]);
  }
}

// A square matrix between its dense form in memory and rows of `width`, plain or transposed.
static inline void unpack(float* padded, const float* dense, int64_t n, int64_t width) {
  for (int64_t p = 0; p < n; ++p) {
    std::memcpy(padded + p * width, dense + p * n, n * sizeof(float));
    std::memset(padded + p * width + n, 0, (width - n) * sizeof(float));
  }
}

static inline void unpack_transposed(float* padded, const float* dense, int64_t n, int64_t width) {
  std::memset(padded, 0, n * width * sizeof(float));
  for (int64_t p = 0; p < n; ++p)
    for (int64_t q = 0; q < n; ++q) padded[q * width + p] = dense[p * n + q];
}

static inline void pack(float* dense, const float* padded, int64_t n, int64_t width) {
  for (int64_t p = 0; p < n; ++p)
    std::memcpy(dense + p * n, padded + p * width, n * sizeof(float));
}

// Scratch memory of `count` floats, aligned for any vector.
struct Scratch {
  std::unique_ptr<char[]> memory;
  float* data;
  explicit Scratch(int64_t count) : memory(new char[count * sizeof(float) + 64]) {
    uintptr_t address = reinterpret_cast<uintptr_t>(memory.get());
    data = reinterpret_cast<float*>((address + 63) / 64 * 64);
  }
};

// Where a head's state before `token` is kept for backward.
static inline int64_t checkpoint_offset(const Wkv6Shape& shape, const Head& head, int64_t token) {
  int64_t row = checkpoint_index(shape, head.sequence, token) * head.token_stride + head.offset;
  return row * head.head_size;
}

static void forward_head(const Wkv6Shape& shape, const Wkv6Inputs& in, const Wkv6Outputs& out,
                         int64_t index, float* S) {
  Head head(shape, index);
  const int64_t n = head.head_size, width = head.width;
  Chunk c;
  Row u = {}, y[kTokens];
  Pairs A;
  std::memcpy(u.at, in.u + head.offset, n * sizeof(float));
  unpack(S, in.state + index * n * n, n, width);
  for (int64_t token = 0; token < head.n_tokens; token += kTokens) {
    if (out.checkpoints && token % kCheckpointSpan == 0)
      pack(out.checkpoints + checkpoint_offset(shape, head, token), S, n, width);
    c.load(head, in, token);
    Chunk::prefetch(head, in, token + kTokens);
    weigh_pairs(A, c, u, width);
    multiply(y, c.reader, S, n, width);
    advance<Keys::kRows>(S, S, c.lost, c.writer, c.v, n, width);
    for (int64_t m = 0; m < width; m += LANES)
      for (int i = 0; i < kTokens; ++i)
        for (int j = 0; j <= i; ++j) y[i].vec(m) += A[i][j] * c.v[j].vec(m);
    head.store(y, out.y, token);
  }
  pack(out.state + index * n * n, S, n, width);
}

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
  for (int64_t m = 0; m < width; m += LANES) {
    Vec products = {};
    for (int64_t p = 0; p < n; ++p) products += vec(St + p * width + m) * vec(Gt + p * width + m);
    g.through.vec(m) = c.kept.vec(m) * products;
  }
  multiply(g.dr, g.dy, St, n, width);
  multiply(g.dk, c.v, Gt, n, width);
  multiply(g.dv, c.writer, G, n, width);
  advance<Keys::kColumns>(Gt, Gt, c.lost, g.dy, c.reader, n, width);
  advance<Keys::kRows>(G, G, c.lost, c.reader, g.dy, n, width);
  for (int64_t m = 0; m < width; m += LANES) {
    for (int j = 0; j < kTokens; ++j)
      for (int i = j; i < kTokens; ++i) g.dv[j].vec(m) += A[i][j] * g.dy[i].vec(m);
    du.vec(m) += finish_key_gradients(g, c, dA, u.vec(m), m);
  }
}

// Matrices of one thread: G and its transpose, and S transposed before each chunk of a span.
struct BackwardScratch {
  Scratch G, Gt, St;
  explicit BackwardScratch(int64_t matrix)
      : G(matrix), Gt(matrix), St(kCheckpointSpan / kTokens * matrix) {}
};

static void backward_head(const Wkv6Shape& shape, const Wkv6Inputs& in, const float* checkpoints,
                          const Wkv6OutputGradients& from, const Wkv6Gradients& out, int64_t index,
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
      c.load(head, in, first + chunk * kTokens);
      Chunk::prefetch(head, in, first + (chunk + 1) * kTokens);
      float* S = St + chunk * matrix;
      advance<Keys::kColumns>(S + matrix, S, c.lost, c.v, c.writer, n, width);
    }
    for (int64_t chunk = n_chunks - 1; chunk >= 0; --chunk) {
      const int64_t token = first + chunk * kTokens;
      c.load(head, in, token);
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

// Products of strong decays sink into denormal numbers, on which some processors are a hundred
// times slower; while one of these lives, they are zero instead.
struct DenormalsAreZero {
#ifdef __SSE__
  unsigned before = __builtin_ia32_stmxcsr();
  DenormalsAreZero() { __builtin_ia32_ldmxcsr(before | 0x8040); }
  ~DenormalsAreZero() { __builtin_ia32_ldmxcsr(before); }
#endif
};

static void forward(const Wkv6Shape& shape, const Wkv6Inputs& in, const Wkv6Outputs& out,
                    int64_t first, int64_t last) {
  DenormalsAreZero while_alive;
  Scratch S(shape.head_size * padded_width(shape.head_size));
  for (int64_t index = first; index < last; ++index) forward_head(shape, in, out, index, S.data);
}

static void backward(const Wkv6Shape& shape, const Wkv6Inputs& in, const float* checkpoints,
                     const Wkv6OutputGradients& from, const Wkv6Gradients& out, int64_t first,
                     int64_t last) {
  DenormalsAreZero while_alive;
  BackwardScratch scratch(shape.head_size * padded_width(shape.head_size));
  for (int64_t index = first; index < last; ++index)
    backward_head(shape, in, checkpoints, from, out, index, scratch);
}

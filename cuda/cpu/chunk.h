// A chunk of tokens: its rows, its decays, the weights of its pairs. Part of kernels.h.
//
// Tokens are taken in chunks of kTokens. Inside a chunk each pair of tokens is weighed directly;
// what crosses a chunk goes through the state. With d the decays of a chunk's tokens:
//   before_i = product of d_l, l < i     after_j = product of d_l, l > j     kept = product of all
//   A_ij = sum_n r_i k_j prod(d_l, j < l < i) for j < i,      A_ii = sum_n r_i u k_i
//   y = A V + (r*before) S        S' = kept*S + (k*after)^T V
// Backward runs the chunks in reverse with G, the gradient of the state at the chunk's end. All
// factors are products of decays, so they lie in [0, 1]: no overflow, and no difference of large
// sums anywhere. See docs/kernels.md.

// Tokens past the end of a sequence have zero rows and decay nothing.
struct Chunk {
  Row r[kTokens], k[kTokens], v[kTokens], decay[kTokens];
  Row reader[kTokens], writer[kTokens];  // r * before, k * after
  Row kept, lost;                        // lost = 1 - kept, precise where the decay is slow
  Row before[kTokens], after[kTokens], log_decay[kTokens];  // for gradients only

  template <bool kGradients>
  void load(const Head& head, const Wkv6Inputs& in, int64_t token) {
    head.load(r, in.r, token);
    head.load(k, in.k, token);
    head.load(v, in.v, token);
    head.load(decay, in.w, token, kNoDecay);
    for (int64_t n = 0; n < head.width; n += LANES) set_decays<kGradients>(n);
  }

  static void prefetch(const Head& head, const Wkv6Inputs& in, int64_t token) {
    for (const void* data : {in.r, in.k, in.v, in.w}) head.prefetch(data, token);
  }

  template <bool kGradients>
  void set_decays(int64_t n) {
    Vec rate[kTokens], total = {}, product = Vec{} + 1.0f;
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; ++i) {
      rate[i] = exponential(at_most(80.0f, decay[i].vec(n))).value();
      decay[i].vec(n) = exponential(-rate[i]).value();
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; ++i) {
      if (kGradients) log_decay[i].vec(n) = -rate[i], before[i].vec(n) = product;
      total -= rate[i];
      reader[i].vec(n) = r[i].vec(n) * product;
      product *= decay[i].vec(n);
    }
    const Exponential all = exponential(total);
    kept.vec(n) = all.value();
    lost.vec(n) = -all.minus_one();
    product = Vec{} + 1.0f;
#pragma GCC unroll 8
    for (int j = kTokens - 1; j >= 0; --j) {
      if (kGradients) after[j].vec(n) = product;
      writer[j].vec(n) = k[j].vec(n) * product;
      product *= decay[j].vec(n);
    }
  }
};

// The weight of each pair is a sum over the lanes of one vector.
static inline void set_pairs(Pairs A, Vec (&lanes)[kTokens][kTokens]) {
  for (int at = 0; at < kTokens * kTokens; at += LANES) {
    Vec sums = sums_of_lanes(&lanes[0][0] + at);
    std::memcpy(&A[0][0] + at, &sums, sizeof sums);
  }
}

// A_ij of the chunk: how much of token j's value token i reads.
static inline void weigh_pairs(Pairs A, const Chunk& c, const Row& u, int64_t width) {
  Vec lanes[kTokens][kTokens] = {};
#pragma GCC unroll 8
  for (int j = 0; j < kTokens; ++j) {
    Vec sums[kTokens] = {};
    for (int64_t n = 0; n < width; n += LANES) {
      Vec kept_k = c.k[j].vec(n);
      sums[j] += c.r[j].vec(n) * u.vec(n) * kept_k;
#pragma GCC unroll 8
      for (int i = j + 1; i < kTokens; ++i) {
        sums[i] += c.r[i].vec(n) * kept_k;
        kept_k *= c.decay[i].vec(n);
      }
    }
#pragma GCC unroll 8
    for (int i = j; i < kTokens; ++i) lanes[i][j] = sums[i];
  }
  set_pairs(A, lanes);
}

// Gradient of A: dA_ij = dy_i . v_j.
static inline void weigh_pair_gradients(Pairs dA, const Row* dy, const Row* v, int64_t width) {
  Vec lanes[kTokens][kTokens] = {};
#pragma GCC unroll 8
  for (int j = 0; j < kTokens; ++j) {
    Vec sums[kTokens] = {};
    for (int64_t n = 0; n < width; n += LANES)
#pragma GCC unroll 8
      for (int i = j; i < kTokens; ++i) sums[i] += dy[i].vec(n) * v[j].vec(n);
#pragma GCC unroll 8
    for (int i = j; i < kTokens; ++i) lanes[i][j] = sums[i];
  }
  set_pairs(dA, lanes);
}

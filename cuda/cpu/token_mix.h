// Token shift and the blends that it feeds. Part of kernels.h. Calls take ranges of channels, so that
// a token finds the one before it, and a sum over tokens is made by one of them alone.

// f(token, where the row before it lies, from which element on)
template <typename F>
static inline __attribute__((always_inline)) void for_tokens(const TokenMix& mix, F f) {
  for (int64_t s = 0; s < mix.n_sequences; ++s)
    for (int64_t t = mix.bounds[s]; t < mix.bounds[s + 1]; ++t) {
      const bool inside = t > mix.bounds[s];
      f(t, inside ? mix.x : mix.before, inside ? (t - 1) * mix.n_channels : s * mix.before_stride);
    }
}

template <typename E>
static void token_mix_band(const TokenMix& mix, void* const* out, int64_t first, int64_t last) {
  const int64_t C = mix.n_channels;
  for_tokens(mix,
             [&](int64_t t, const void* before, int64_t before_at) __attribute__((always_inline)) {
               for_vectors(first, last, [&](int64_t c, auto count) __attribute__((always_inline)) {
                 const Vec x = load<E>(mix.x, t * C + c, count);
                 const Vec difference = load<E>(before, before_at + c, count) - x;
                 for (int64_t j = 0; j < mix.n_mixtures; ++j) {
                   Vec blend = load<E>(mix.maa, j * C + c, count);
                   if (mix.blends) blend += load<E>(mix.blends[j], t * C + c, count);
                   store<E>(out[j], t * C + c, x + difference * blend, count);
                 }
               });
             });
}

static void token_mix(const TokenMix& mix, void* const* out, int64_t first, int64_t last) {
  with_element(mix.element, [&](auto e) { token_mix_band<decltype(e)>(mix, out, first, last); });
}

template <typename E>
static void token_mix_backward_band(const TokenMix& mix, const TokenMixGradients& d, int64_t first,
                                    int64_t last) {
  const int64_t C = mix.n_channels;
  for (int64_t j = 0; d.maa && j < mix.n_mixtures; ++j)
    std::fill(d.maa + j * C + first, d.maa + j * C + last, 0.0f);
  for_tokens(
      mix, [&](int64_t t, const void* before, int64_t before_at) __attribute__((always_inline)) {
        for_vectors(first, last, [&](int64_t c, auto count) __attribute__((always_inline)) {
          Vec sum = {}, blended = {}, difference = {};
          if (mix.blends || d.maa)
            difference = load<E>(before, before_at + c, count) - load<E>(mix.x, t * C + c, count);
          for (int64_t j = 0; j < mix.n_mixtures; ++j) {
            const Vec dout = load<E>(d.out[j], t * C + c, count), moved = dout * difference;
            Vec blend = load<E>(mix.maa, j * C + c, count);
            if (mix.blends) {
              blend += load<E>(mix.blends[j], t * C + c, count);
              store<E>(mix.blends[j], t * C + c, moved, count);
            }
            if (d.maa) {
              const Vec so_far = load<Float32>(d.maa, j * C + c, count);
              store<Float32>(d.maa, j * C + c, so_far + moved, count);
            }
            sum += dout;
            blended += dout * blend;
          }
          store<E>(d.sum, t * C + c, sum, count);
          store<E>(d.blended, t * C + c, blended, count);
        });
      });
}

static void token_mix_backward(const TokenMix& mix, const TokenMixGradients& d, int64_t first,
                               int64_t last) {
  with_element(mix.element,
               [&](auto e) { token_mix_backward_band<decltype(e)>(mix, d, first, last); });
}

template <typename E>
static void shift_backward_band(const TokenMix& mix, const ShiftGradients& d, int64_t first,
                                int64_t last) {
  const int64_t C = mix.n_channels;
  Scratch carried(last - first);  // blended of the token after
  for (int64_t s = 0; s < mix.n_sequences; ++s) {
    std::fill(carried.data, carried.data + (last - first), 0.0f);
    for (int64_t t = mix.bounds[s + 1] - 1; t >= mix.bounds[s]; --t)
      for_vectors(first, last, [&](int64_t c, auto count) __attribute__((always_inline)) {
        Vec sum = load<E>(d.sum, t * C + c, count), blended = load<E>(d.blended, t * C + c, count);
        if (d.more) {
          const Vec more = load<E>(d.more, t * C + c, count);
          sum += more;
          blended += more * load<E>(d.maa, c, count);
        }
        const Vec after = load<Float32>(carried.data, c - first, count);
        store<E>(d.x, t * C + c, sum - blended + after, count);
        store<Float32>(carried.data, c - first, blended, count);
      });
    if (d.before) store_row(carried.data, d.before, mix.element, s * C + first, last - first);
  }
}

static void shift_backward(const TokenMix& mix, const ShiftGradients& d, int64_t first,
                           int64_t last) {
  with_element(mix.element, [&](auto e) { shift_backward_band<decltype(e)>(mix, d, first, last); });
}

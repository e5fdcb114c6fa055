// The forward pass. Part of kernels.h.

static void forward_turn(const WkvShape& shape, const Wkv6Inputs& in, const WkvOutputs& out,
                         const Head& head, float* S, int64_t first_token) {
  const int64_t n = head.head_size, width = head.width;
  const int64_t last_token = std::min(first_token + kForwardTurn, head.n_tokens);
  Chunk c;
  Row u = {}, y[kTokens];
  Pairs A;
  std::memcpy(u.at, in.u + head.offset, n * sizeof(float));
  for (int64_t token = first_token; token < last_token; token += kTokens) {
    if (out.checkpoints && token % kCheckpointSpan == 0)
      pack(out.checkpoints + checkpoint_offset(shape, head, token), S, n, width);
    c.load<false>(head, in, token);
    Chunk::prefetch(head, in, token + kForwardTurn);
    weigh_pairs(A, c, u, width);
    multiply_with_pairs<Of::kLaterToken>(y, c.reader, S, A, c.v, n, width);
    advance<Keys::kRows>(S, S, c.lost.at, c.writer, c.v, n, width);
    head.store(y, out.y, token);
  }
}

static void wkv6_forward(const WkvShape& shape, const Wkv6Inputs& in, const WkvOutputs& out,
                         int64_t first, int64_t last) {
  DenormalsAreZero while_alive;
  const int64_t n = shape.head_size, width = padded_width(n);
  Scratch states(std::min(last - first, shape.n_heads) * n * width);
  for (int64_t begin = first, end; begin < last; begin = end) {
    end = std::min(last, (begin / shape.n_heads + 1) * shape.n_heads);  // of the sequence's heads
    const auto state = [&](int64_t index) { return states.data + (index - begin) * n * width; };
    for (int64_t index = begin; index < end; ++index)
      unpack(state(index), in.state + index * n * n, n, width);
    const int64_t n_tokens = Head(shape, begin).n_tokens;
    for (int64_t token = 0; token < n_tokens; token += kForwardTurn)
      for (int64_t index = begin; index < end; ++index)
        forward_turn(shape, in, out, Head(shape, index), state(index), token);
    for (int64_t index = begin; index < end; ++index)
      pack(out.state + index * n * n, state(index), n, width);
  }
}

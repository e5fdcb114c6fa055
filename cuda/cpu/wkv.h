// What the WKV kernels of all generations share: where tokens lie, and which states are saved. The
// caller owns the memory.
#pragma once

#include "element.h"

namespace finchtune {

// A token's row of one head has head_size elements; the rows of one token lie side by side, and
// the tokens of all sequences follow one another: (tokens, n_heads, head_size).
struct WkvShape {
  int64_t n_sequences, n_heads, head_size;
  const int64_t* bounds;  // n_sequences + 1 token positions: where each sequence starts and ends
  Element element;        // of all token rows; everything else is float
};

// The states that backward starts from: one for each kCheckpointSpan tokens of each sequence, the
// initial state first, (checkpoint_count(), n_heads, head_size, head_size).
constexpr int64_t kCheckpointSpan = 64;

inline int64_t checkpoint_index(const WkvShape& shape, int64_t sequence, int64_t token) {
  // Each sequence adds at most one incomplete span, so no two sequences share an index.
  return shape.bounds[sequence] / kCheckpointSpan + sequence + token / kCheckpointSpan;
}

inline int64_t checkpoint_count(const WkvShape& shape) {
  return checkpoint_index(shape, shape.n_sequences, 0);
}

struct WkvOutputs {
  void* y;
  float* state;
  float* checkpoints;  // null when no backward will follow
};

struct WkvOutputGradients {
  const void* y;
  const float* state;
};

constexpr int64_t kMaxHeadSize = 128;

}  // namespace finchtune

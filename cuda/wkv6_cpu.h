// WKV6 on a CPU: the arguments of the kernel, and the instruction sets it is compiled for.
// No torch here: the caller owns the memory and shares the heads out among its threads.
#pragma once

#include <cstdint>

namespace finchtune {

enum class Element { kFloat32, kBfloat16 };

// A token's row of one head has head_size elements; the rows of one token lie side by side, and
// the tokens of all sequences follow one another: (tokens, n_heads, head_size).
struct Wkv6Shape {
  int64_t n_sequences, n_heads, head_size;
  const int64_t* bounds;  // n_sequences + 1 token positions: where each sequence starts and ends
  Element element;        // of all token rows; everything else is float
};

struct Wkv6Inputs {
  const void *r, *k, *v, *w;
  const float* u;      // (n_heads, head_size)
  const float* state;  // (n_sequences, n_heads, head_size key, head_size value)
};

// The states that backward starts from: one for each kCheckpointSpan tokens of each sequence, the
// initial state first, (checkpoint_count(), n_heads, head_size key, head_size value).
constexpr int64_t kCheckpointSpan = 64;

inline int64_t checkpoint_index(const Wkv6Shape& shape, int64_t sequence, int64_t token) {
  // Each sequence adds at most one incomplete span, so no two sequences share an index.
  return shape.bounds[sequence] / kCheckpointSpan + sequence + token / kCheckpointSpan;
}

inline int64_t checkpoint_count(const Wkv6Shape& shape) {
  return checkpoint_index(shape, shape.n_sequences, 0);
}

struct Wkv6Outputs {
  void* y;
  float* state;
  float* checkpoints;  // null when no backward will follow
};

struct Wkv6OutputGradients {
  const void* y;
  const float* state;
};

struct Wkv6Gradients {
  void *r, *k, *v, *w;
  float* u;  // (n_sequences, n_heads, head_size): one share for each sequence, to be added up
  float* state;
};

// One compiled form of the kernel. Heads are numbered over all sequences, as sequence * n_heads +
// head; a call works on those from first up to last, and no two calls may share one.
struct Wkv6CpuPath {
  const char* name;
  bool (*supported)();
  void (*forward)(const Wkv6Shape&, const Wkv6Inputs&, const Wkv6Outputs&, int64_t first,
                  int64_t last);
  void (*backward)(const Wkv6Shape&, const Wkv6Inputs&, const float* checkpoints,
                   const Wkv6OutputGradients&, const Wkv6Gradients&, int64_t first, int64_t last);
  // Rows from first up to last of logits (rows, n): the loss of each against its label, and its
  // gradient in the place of the logits, with l2wrap times the largest logit added at that one's.
  void (*cross_entropy)(void* logits, Element element, int64_t n, const int64_t* labels,
                        float l2wrap, float* losses, int64_t first, int64_t last);
};

constexpr int64_t kMaxHeadSize = 128;

// All compiled forms, the fastest first; the last runs everywhere.
extern const Wkv6CpuPath kWkv6CpuPaths[];
extern const int kWkv6CpuPathCount;

}  // namespace finchtune

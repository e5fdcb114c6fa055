// The CPU kernels and the instruction sets they are compiled for. No torch here: the caller owns
// the memory and shares the work out among its threads, each from a first up to a last item.
#pragma once

#include "wkv6.h"

namespace finchtune {

struct CpuKernels {
  // Heads are numbered over all sequences, as sequence * n_heads + head; no two calls may share one.
  void (*wkv6_forward)(const Wkv6Shape&, const Wkv6Inputs&, const Wkv6Outputs&, int64_t first,
                       int64_t last);
  void (*wkv6_backward)(const Wkv6Shape&, const Wkv6Inputs&, const float* checkpoints,
                        const Wkv6OutputGradients&, const Wkv6Gradients&, int64_t first,
                        int64_t last);
  // Rows of logits (rows, n): the loss of each against its label, and its gradient in the place of
  // the logits, with l2wrap times the largest logit added at that one's.
  void (*cross_entropy)(void* logits, Element element, int64_t n, const int64_t* labels,
                        float l2wrap, float* losses, int64_t first, int64_t last);
};

struct CpuPath {
  const char* name;
  bool (*supported)();
  CpuKernels kernels;
};

// All compiled forms, the fastest first; the last runs everywhere.
extern const CpuPath kCpuPaths[];
extern const int kCpuPathCount;

}  // namespace finchtune

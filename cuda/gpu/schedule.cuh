// How the tensor-core kernels share a problem out among thread blocks.
#pragma once

#include "backward.cuh"
#include "launch.cuh"
#include "segments.cuh"

namespace wkv6 {

using finchtune::ceil_div;
using finchtune::device_attribute;

constexpr int64_t SHORTEST_SEGMENT = 4 * CHUNK;  // the pre-pass and the join have to pay

// How many thread blocks of a tensor-core kernel run at the same time.
template <typename Args>
int64_t places(void (*kernel)(Args), size_t shared_bytes) {
  static_assert(sizeof(BackwardShared) <= finchtune::ALWAYS_ALLOWED);
  int blocks = 0;
  finchtune::prefer_shared_memory(kernel);
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, THREADS, shared_bytes) !=
          cudaSuccess ||
      blocks < 1) {
    blocks = 1;
  }
  return blocks * device_attribute(cudaDevAttrMultiProcessorCount);
}

// Fills the places evenly: of a batch, the heads that would be left for a last, incomplete turn are
// cut, so that their segments fill one or more shorter turns, where that pays for the pre-pass, a
// quarter of the kernel's own time. The lengths of packed sequences lie on the GPU; none of their
// segments is longer than half of what a place does if all do the same.
inline Segments choose_segments(const Wkv6Problem& p, int64_t places) {
  const Segments uncut = uncut_segments(p);
  const auto chunks = [](int64_t tokens) { return ceil_div(tokens, CHUNK) * CHUNK; };
  if (p.cu_seqlens != nullptr) {
    const int64_t half = chunks(ceil_div(p.T * p.H, 2 * places));
    const int64_t length = half > SHORTEST_SEGMENT ? half : SHORTEST_SEGMENT;
    return length < p.T ? Segments{length, 0, p.T / length + p.n_seq} : uncut;
  }
  const int64_t heads = Segments::heads(p), rest = heads % places;
  Segments best = uncut;
  double least = 0.9 * p.T;  // tokens that a place does for the rest
  for (int64_t count = 2; rest > 0 && count * SHORTEST_SEGMENT <= p.T; count++) {
    const int64_t length = chunks(ceil_div(p.T, count)), used = ceil_div(p.T, length);
    const double tokens = 1.25 * length * ceil_div(rest * used, places);
    if (tokens < least) {
      least = tokens;
      best = {length, heads - rest, used};
    }
  }
  return best;
}

inline Segments choose_segments(const Wkv6Problem& p, bool backward) {
  return choose_segments(p, backward ? places(backward_kernel, sizeof(BackwardShared))
                                     : places(forward_kernel, sizeof(ForwardShared)));
}

// Whether a sequence may have several segments.
inline bool is_cut(const Wkv6Problem& p, Segments segments) { return segments.length < p.T; }

}  // namespace wkv6

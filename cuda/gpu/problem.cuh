// What every kernel shares: which tokens a thread block works on, where they lie.
#pragma once

#include <cstdint>

#include "device.cuh"
#include "wkv6.h"

namespace wkv6 {

using finchtune::from_float;
using finchtune::shared_memory;
using finchtune::to_float;

// A state is checkpointed before every chunk of this many tokens of a sequence.
constexpr int CHUNK = 64;

// Where a sequence lies along the flattened (B, T) axis, in tokens.
struct Sequence {
  int64_t begin;
  int length;

  __device__ Sequence(const Wkv6Problem& problem, int sequence) {
    begin = sequence * problem.T;
    length = static_cast<int>(problem.T);
    if (problem.cu_seqlens != nullptr) {
      begin = problem.cu_seqlens[sequence];
      length = problem.cu_seqlens[sequence + 1] - static_cast<int>(begin);
    }
  }
};

// How the work is shared out among thread blocks. Each of the first `whole` heads of a batch is one
// block's; the others are cut into segments, block after block of the same segment of all of them.
// Packed sequences count as one here, so that a long one among short ones is cut too: their segments
// are numbered through, sequence `i` from first_segment(i) on, never fewer than it needs.
struct Segments {
  int64_t length;    // tokens of a segment, a multiple of CHUNK
  int64_t whole;     // heads, of all sequences of a batch
  int64_t per_head;  // segments of each other head

  static __host__ __device__ int64_t heads(const Wkv6Problem& problem) {
    return problem.cu_seqlens == nullptr ? problem.n_seq * problem.H : problem.H;
  }
  // Segments of all heads that are cut; each has a slot in the temporary buffers.
  __host__ __device__ int64_t slots(const Wkv6Problem& problem) const {
    return (heads(problem) - whole) * per_head;
  }
  __host__ __device__ int64_t blocks(const Wkv6Problem& problem) const {
    return whole + slots(problem);
  }
  __device__ int64_t first_segment(const Wkv6Problem& problem, int sequence) const {
    return problem.cu_seqlens == nullptr ? 0 : problem.cu_seqlens[sequence] / length + sequence;
  }
  // The last of the packed sequences that begin at or before segment `segment`.
  __device__ int sequence_of(const Wkv6Problem& problem, int64_t segment) const {
    int low = 0, high = static_cast<int>(problem.n_seq) - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_segment(problem, middle) <= segment)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
  // Slot of a segment of a head that is cut.
  __device__ int64_t slot(const Wkv6Problem& problem, int sequence, int head, int segment) const {
    if (problem.cu_seqlens != nullptr)
      return (first_segment(problem, sequence) + segment) * problem.H + head;
    return segment * (heads(problem) - whole) + sequence * problem.H + head - whole;
  }
};

// A thread block for each head of each sequence.
inline __host__ __device__ Segments uncut_segments(const Wkv6Problem& problem) {
  if (problem.cu_seqlens != nullptr) return {INT64_MAX, 0, problem.n_seq};
  return {INT64_MAX, problem.n_seq * problem.H, 1};
}

// The part of the problem that one thread block works on: one head of one segment of one sequence.
struct Work {
  int sequence, head;
  int length;        // tokens in the segment; 0 where the sequence ends before it
  int64_t begin;     // first token of the segment
  int64_t skipped;   // tokens of the sequence before it
  bool first, last;  // of the segments that the sequence really has

  __device__ Work(const Wkv6Problem& problem, Segments segments, int64_t block) {
    const int64_t rest = Segments::heads(problem) - segments.whole;
    const bool cut = block >= segments.whole;
    const int64_t of_heads = cut ? (block - segments.whole) / rest : 0;
    const int64_t index = cut ? segments.whole + (block - segments.whole) % rest : block;
    head = static_cast<int>(index % problem.H);
    int64_t segment = of_heads;
    sequence = static_cast<int>(index / problem.H);
    if (problem.cu_seqlens != nullptr) {
      sequence = segments.sequence_of(problem, of_heads);
      segment -= segments.first_segment(problem, sequence);
    }
    const Sequence own(problem, sequence);
    skipped = cut ? segment * segments.length : 0;
    begin = own.begin + skipped;
    const int64_t left = own.length - skipped;
    const int64_t longest = cut ? segments.length : left;
    length = static_cast<int>(left < 0 ? 0 : left < longest ? left : longest);
    first = segment == 0;
    // An empty sequence still has one segment: it passes its state on.
    last = left <= longest && (left > 0 || first);
  }

  __device__ int chunks() const { return (length + CHUNK - 1) / CHUNK; }

  // Offset of this head's channels of token `t` of the segment in a (B, T, H, N) tensor.
  __device__ int64_t token_offset(const Wkv6Problem& problem, int64_t t) const {
    return ((begin + t) * problem.H + head) * problem.N;
  }

  // Index of (sequence, head), the leading axes of a tensor of states.
  __device__ int64_t state_index(const Wkv6Problem& problem) const {
    return sequence * problem.H + head;
  }

  // Index of the checkpoint before a chunk of the segment. Sequences start at any token, so a
  // sequence gets the slots from floor(begin / CHUNK) + sequence on: never fewer than it needs.
  __device__ int64_t checkpoint_index(const Wkv6Problem& problem, int64_t chunk) const {
    return ((begin - skipped) / CHUNK + sequence + skipped / CHUNK + chunk) * problem.H + head;
  }
};

inline int64_t checkpoint_count(const Wkv6Problem& problem) {
  return (problem.B * problem.T / CHUNK + problem.n_seq) * problem.H;
}

}  // namespace wkv6

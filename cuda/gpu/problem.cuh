// What every kernel shares: which tokens a thread block works on, where they lie, their dtypes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "wkv6.h"

namespace wkv6 {

// A state is checkpointed before every chunk of this many tokens of a sequence.
constexpr int CHUNK = 64;

// How the sequences are cut so that a few heads still fill the GPU; see segments.cuh.
struct Segments {
  int64_t length;        // tokens of a segment, a multiple of CHUNK
  int64_t per_sequence;  // segments of the longest possible sequence; 1: not cut
};
constexpr Segments UNCUT = {INT64_MAX, 1};

// The part of the problem that one thread block works on: one head of one segment of one sequence.
// Positions count along the flattened (B, T) axis.
struct Work {
  int sequence, segment, head;
  int64_t slot;            // index of (sequence, segment, head)
  int64_t sequence_begin;  // first token of the sequence
  int64_t begin;           // first token of the segment
  int64_t length;          // tokens in the segment; 0 where the sequence ends before it
  bool first, last;        // of the segments that the sequence really has

  __device__ Work(const Wkv6Problem& problem, Segments segments, int64_t block) : slot(block) {
    head = static_cast<int>(block % problem.H);
    segment = static_cast<int>(block / problem.H % segments.per_sequence);
    sequence = static_cast<int>(block / problem.H / segments.per_sequence);
    sequence_begin = sequence * problem.T;
    int64_t sequence_length = problem.T;
    if (problem.cu_seqlens != nullptr) {
      sequence_begin = problem.cu_seqlens[sequence];
      sequence_length = problem.cu_seqlens[sequence + 1] - sequence_begin;
    }
    const int64_t offset = segment * segments.length;
    const int64_t rest = sequence_length - offset;
    begin = sequence_begin + offset;
    length = rest < 0 ? 0 : rest < segments.length ? rest : segments.length;
    first = segment == 0;
    // An empty sequence still has one segment: it passes its state on.
    last = rest <= segments.length && (rest > 0 || first);
  }

  __device__ int chunks() const { return static_cast<int>((length + CHUNK - 1) / CHUNK); }

  // Offset of this head's channels of token `t` of the segment in a (B, T, H, N) tensor.
  __device__ int64_t token_offset(const Wkv6Problem& problem, int64_t t) const {
    return ((begin + t) * problem.H + head) * problem.N;
  }

  // Index of (sequence, head), the leading axes of a tensor of states.
  __device__ int64_t state_index(const Wkv6Problem& problem) const {
    return sequence * problem.H + head;
  }

  // Index of the checkpoint before chunk `chunk` of the segment. Sequences start at any token, so a
  // sequence gets the slots from floor(begin / CHUNK) + sequence on: never fewer than it needs.
  __device__ int64_t checkpoint_index(const Wkv6Problem& problem, int64_t chunk) const {
    const int64_t chunk_of_sequence = (begin - sequence_begin) / CHUNK + chunk;
    return (sequence_begin / CHUNK + sequence + chunk_of_sequence) * problem.H + head;
  }
};

inline int64_t checkpoint_count(const Wkv6Problem& problem) {
  return (problem.B * problem.T / CHUNK + problem.n_seq) * problem.H;
}

// The dynamic shared memory of the block, as the kernel's own struct.
template <typename Shared>
__device__ __forceinline__ Shared& shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  return *reinterpret_cast<Shared*>(dynamic_shared);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

}  // namespace wkv6

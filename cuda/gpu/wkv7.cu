// The launchers of wkv7.h: which kernel a problem takes, and its buffers.
#include "wkv7.h"

#include <cuda_runtime.h>

#include "dtypes.cuh"
#include "wkv7_backward.cuh"
#include "wkv7_forward.cuh"
#include "wkv7_scan_backward.cuh"
#include "wkv7_scan_forward.cuh"

namespace wkv7 {
namespace {

using finchtune::aligned;
using finchtune::device_attribute;
using finchtune::launch;

// Elements of a row in each thread, so that 256 or 512 threads hold a matrix.
constexpr int FEW = 16, MANY = 32;

// Calls f with a value of the C++ type of the problem's dtype and the elements of a thread.
template <typename F>
cudaError_t with_form(const Wkv6Problem& p, F f) {
  return wkv6::with_dtype(p, [&](auto element) {
    return p.N <= 64 ? f(element, std::integral_constant<int, FEW>())
                     : f(element, std::integral_constant<int, MANY>());
  });
}

int threads_for(const Wkv6Problem& p) {
  const int n = static_cast<int>(p.N);
  return p.N <= 64 ? Place<FEW>::threads_for(n) : Place<MANY>::threads_for(n);
}

// Of a backward: as many as run at the same time, so that the scratch does not grow with the number
// of packed sequences.
int64_t backward_blocks(const Wkv6Problem& p) {
  const int64_t places = 4 * device_attribute(cudaDevAttrMultiProcessorCount);
  return p.n_seq * p.H < places ? p.n_seq * p.H : places;
}

static_assert(2 * (sizeof(ChunkForwardShared) + wkv6::RESERVED) <= 100 * 1024);  // 8.6, 8.9, 12.0
static_assert(sizeof(ChunkBackwardShared) <= wkv6::BLOCK_LIMIT);
static_assert(CHUNK_BACKWARD_BLOCKS * (sizeof(ChunkBackwardShared) + wkv6::RESERVED) <=
              wkv6::MULTIPROCESSOR_LIMIT);
static_assert(CHUNK_FORWARD_BLOCKS * (sizeof(ChunkForwardShared) + wkv6::RESERVED) <=
              wkv6::MULTIPROCESSOR_LIMIT);

RowPointers pointers(const void* const* rows) {
  const auto at = [rows](int row) { return static_cast<const bf16*>(rows[row]); };
  return {at(R), at(K), at(V), at(DECAY), at(A), at(B)};
}

bool all_aligned(const void* const* rows) {
  bool all = true;
  for (int row = 0; row < INPUT_ROWS; row++) all = all && aligned(rows[row]);
  return all;
}

}  // namespace
}  // namespace wkv7

using namespace wkv7;

extern "C" {

int64_t wkv7_checkpoint_count(const Wkv6Problem* p) { return wkv6::checkpoint_count(*p) / p->H; }

size_t wkv7_checkpoint_bytes(const Wkv6Problem* p) {
  return wkv6::checkpoint_count(*p) * p->N * p->N * sizeof(float);
}

size_t wkv7_backward_scratch_bytes(const Wkv6Problem* p) {
  if (wkv6::uses_tensor_cores(*p)) return 0;
  const int threads = threads_for(*p);
  const int64_t each =
      p->N <= 64 ? Scratch<FEW>::size(p->N, threads) : Scratch<MANY>::size(p->N, threads);
  return backward_blocks(*p) * each * sizeof(float);
}

int wkv7_forward(const Wkv6Problem* p, const void* const* rows, const float* state_in, void* y,
                 float* state_out, float* checkpoints, void* stream) {
  if (!wkv6::valid(*p)) return cudaErrorInvalidValue;
  if (!all_aligned(rows) || !aligned(state_in, y, state_out, checkpoints))
    return cudaErrorMisalignedAddress;
  if (wkv6::uses_tensor_cores(*p)) {
    return launch(chunk_forward_kernel, p->n_seq * p->H, wkv6::THREADS, sizeof(ChunkForwardShared),
                  stream,
                  ChunkForwardArgs{*p, pointers(rows), state_in, static_cast<bf16*>(y), state_out,
                                   checkpoints});
  }
  return with_form(*p, [&](auto element, auto elements) {
    using T = decltype(element);
    ForwardArgs<T> args = {*p, {}, state_in, static_cast<T*>(y), state_out, checkpoints};
    for (int row = 0; row < INPUT_ROWS; row++) args.rows[row] = static_cast<const T*>(rows[row]);
    return launch(scan_forward_kernel<T, elements>, p->n_seq * p->H, threads_for(*p),
                  sizeof(Tokens), stream, args);
  });
}

int wkv7_backward(const Wkv6Problem* p, const void* const* rows, const void* dy,
                  const float* dstate_out, const float* checkpoints, void* const* gradients,
                  float* dstate_in, void* scratch, void* stream) {
  if (!wkv6::valid(*p)) return cudaErrorInvalidValue;
  if (!all_aligned(rows) || !all_aligned(gradients) ||
      !aligned(dy, dstate_out, checkpoints, dstate_in))
    return cudaErrorMisalignedAddress;
  if (wkv6::uses_tensor_cores(*p)) {
    const auto at = [gradients](int row) { return static_cast<bf16*>(gradients[row]); };
    return launch(
        chunk_backward_kernel, p->n_seq * p->H, wkv6::THREADS, sizeof(ChunkBackwardShared), stream,
        ChunkBackwardArgs{*p, pointers(rows), static_cast<const bf16*>(dy), dstate_out, checkpoints,
                          at(R), at(K), at(V), at(DECAY), at(A), at(B), dstate_in});
  }
  return with_form(*p, [&](auto element, auto elements) {
    using T = decltype(element);
    BackwardArgs<T> args = {*p,
                            {},
                            dstate_out,
                            checkpoints,
                            {},
                            dstate_in,
                            static_cast<float*>(scratch),
                            backward_blocks(*p)};
    for (int row = 0; row < INPUT_ROWS; row++) {
      args.rows[row] = static_cast<const T*>(rows[row]);
      args.gradients[row] = static_cast<T*>(gradients[row]);
    }
    args.rows[DY] = static_cast<const T*>(dy);
    return launch(scan_backward_kernel<T, elements>, args.blocks, threads_for(*p), sizeof(Tokens),
                  stream, args);
  });
}

const char* wkv7_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // extern "C"

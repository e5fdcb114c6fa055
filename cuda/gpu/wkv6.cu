// The launchers of wkv6.h: which kernels a problem takes, and their buffers.
#include <cuda_runtime.h>

#include "dtypes.cuh"
#include "scan_backward.cuh"
#include "scan_forward.cuh"
#include "schedule.cuh"
#include "sum.cuh"

namespace wkv6 {
namespace {

using finchtune::aligned;
using finchtune::launch;

static_assert(2 * (sizeof(BackwardShared) + RESERVED) <= 100 * 1024);  // 8.6, 8.9, 12.0
static_assert(sizeof(BackwardShared) <= BLOCK_LIMIT);
static_assert(BACKWARD_BLOCKS * (sizeof(BackwardShared) + RESERVED) <= MULTIPROCESSOR_LIMIT);
static_assert(FORWARD_BLOCKS * (sizeof(ForwardShared) + RESERVED) <= MULTIPROCESSOR_LIMIT);
static_assert(scan_shared_bytes(128, SCAN_BACKWARD_ROWS) <= BLOCK_LIMIT);

// The temporary buffer of a launch on tensor cores: states and decays of the segments, where
// sequences are cut, then the parts of du, for a backward.
struct Scratch {
  float *states = nullptr, *decays = nullptr, *du = nullptr;
  size_t bytes = 0;

  Scratch(const Wkv6Problem& p, Segments segments, bool backward, void* memory) {
    const auto take = [&](int64_t count) {
      float* const start =
          memory == nullptr ? nullptr : static_cast<float*>(memory) + bytes / sizeof(float);
      bytes += count * sizeof(float);
      return start;
    };
    if (is_cut(p, segments)) {
      states = take(segments.slots(p) * HEAD_SIZE * HEAD_SIZE);
      decays = take(segments.slots(p) * HEAD_SIZE);
    }
    if (backward) du = take(segments.blocks(p) * HEAD_SIZE);
  }
};

template <bool BACKWARD>
cudaError_t launch_segments(const SegmentArgs& args, void* stream) {
  const Wkv6Problem& p = args.problem;
  if (!is_cut(p, args.segments)) return cudaSuccess;
  cudaError_t error = launch(segment_kernel<BACKWARD>, args.segments.slots(p), THREADS,
                             sizeof(SegmentShared), stream, args);
  if (error != cudaSuccess) return error;
  return launch(join_kernel<BACKWARD>, (p.n_seq * p.H - args.segments.whole) * JOIN_BLOCKS, THREADS,
                0, stream, args);
}

cudaError_t tensor_core_forward(ForwardArgs args, void* scratch_memory, void* stream) {
  args.segments = choose_segments(args.problem, false);
  const Scratch scratch(args.problem, args.segments, false, scratch_memory);
  args.entering = scratch.states;
  const cudaError_t error =
      launch_segments<false>({args.problem, args.segments, args.k, args.v, args.w, args.state_in,
                              scratch.states, scratch.decays},
                             stream);
  if (error != cudaSuccess) return error;
  return launch(forward_kernel, args.segments.blocks(args.problem), THREADS, sizeof(ForwardShared),
                stream, args);
}

cudaError_t tensor_core_backward(BackwardArgs args, void* scratch_memory, void* stream) {
  const Wkv6Problem& p = args.problem;
  args.segments = choose_segments(p, true);
  const Scratch scratch(p, args.segments, true, scratch_memory);
  args.entering = scratch.states;
  cudaError_t error = launch_segments<true>(
      {p, args.segments, args.r, args.dy, args.w, args.dstate_out, scratch.states, scratch.decays},
      stream);
  if (error != cudaSuccess) return error;
  float* const du = args.du;
  args.du = scratch.du;
  error = launch(backward_kernel, args.segments.blocks(p), THREADS, sizeof(BackwardShared), stream,
                 args);
  if (error != cudaSuccess) return error;
  return launch_sum(p, args.segments, scratch.du, du, stream);
}

int scan_threads(const Wkv6Problem& p) { return static_cast<int>(ceil_div(p.N, 32) * 32); }

template <typename T>
cudaError_t scan_forward(const ScanForwardArgs<T>& args, void* stream) {
  const Wkv6Problem& p = args.problem;
  return launch(scan_forward_kernel<T>, p.n_seq * p.H, scan_threads(p),
                scan_shared_bytes(p.N, SCAN_FORWARD_ROWS), stream, args);
}

int64_t scan_du_size(const Wkv6Problem& p) { return p.n_seq * p.H * p.N; }

int64_t step_states_size(const Wkv6Problem& p) { return scan_du_size(p) * (STEPS - 1) * p.N; }

template <typename T>
cudaError_t scan_backward(ScanBackwardArgs<T> args, void* scratch, void* stream) {
  const Wkv6Problem& p = args.problem;
  float* const du = args.du;
  args.step_states = static_cast<float*>(scratch);
  args.du = args.step_states + step_states_size(p);
  const cudaError_t error = launch(scan_backward_kernel<T>, p.n_seq * p.H, scan_threads(p),
                                   scan_shared_bytes(p.N, SCAN_BACKWARD_ROWS), stream, args);
  if (error != cudaSuccess) return error;
  return launch_sum(p, uncut_segments(p), args.du, du, stream);
}

template <typename T>
const T* in(const void* pointer) {
  return static_cast<const T*>(pointer);
}
template <typename T>
T* out(void* pointer) {
  return static_cast<T*>(pointer);
}

}  // namespace
}  // namespace wkv6

using namespace wkv6;

extern "C" {

void wkv6_schedule(const Wkv6Problem* p, int64_t places, int64_t* length, int64_t* whole,
                   int64_t* per_head) {
  const Segments segments = choose_segments(*p, places);
  *length = segments.length, *whole = segments.whole, *per_head = segments.per_head;
}

int64_t wkv6_checkpoint_count(const Wkv6Problem* p) { return checkpoint_count(*p) / p->H; }

size_t wkv6_checkpoint_bytes(const Wkv6Problem* p) {
  const size_t element = uses_tensor_cores(*p) ? sizeof(bf16) : sizeof(float);
  return checkpoint_count(*p) * p->N * p->N * element;
}

size_t wkv6_forward_scratch_bytes(const Wkv6Problem* p) {
  return uses_tensor_cores(*p) ? Scratch(*p, choose_segments(*p, false), false, nullptr).bytes : 0;
}

size_t wkv6_backward_scratch_bytes(const Wkv6Problem* p) {
  if (uses_tensor_cores(*p)) return Scratch(*p, choose_segments(*p, true), true, nullptr).bytes;
  return (step_states_size(*p) + scan_du_size(*p)) * sizeof(float);
}

int wkv6_forward(const Wkv6Problem* p, const void* r, const void* k, const void* v, const void* w,
                 const float* u, const float* state_in, void* y, float* state_out,
                 void* checkpoints, void* scratch, void* stream) {
  if (!valid(*p)) return cudaErrorInvalidValue;
  if (!aligned(r, k, v, w, y, checkpoints)) return cudaErrorMisalignedAddress;
  if (uses_tensor_cores(*p)) {
    return tensor_core_forward({*p,
                                {},
                                in<bf16>(r),
                                in<bf16>(k),
                                in<bf16>(v),
                                in<bf16>(w),
                                u,
                                state_in,
                                nullptr,
                                out<bf16>(y),
                                state_out,
                                out<uint4>(checkpoints)},
                               scratch, stream);
  }
  return with_dtype(*p, [&](auto element) {
    using T = decltype(element);
    return scan_forward<T>({*p, in<T>(r), in<T>(k), in<T>(v), in<T>(w), u, state_in, out<T>(y),
                            state_out, out<float>(checkpoints)},
                           stream);
  });
}

int wkv6_backward(const Wkv6Problem* p, const void* r, const void* k, const void* v, const void* w,
                  const float* u, const void* dy, const float* dstate_out, const void* checkpoints,
                  void* dr, void* dk, void* dv, void* dw, float* du, float* dstate_in,
                  void* scratch, void* stream) {
  if (!valid(*p)) return cudaErrorInvalidValue;
  if (!aligned(r, k, v, w, dy, checkpoints, dr, dk, dv, dw)) return cudaErrorMisalignedAddress;
  if (uses_tensor_cores(*p)) {
    return tensor_core_backward({*p,
                                 {},
                                 in<bf16>(r),
                                 in<bf16>(k),
                                 in<bf16>(v),
                                 in<bf16>(w),
                                 in<bf16>(dy),
                                 u,
                                 dstate_out,
                                 nullptr,
                                 in<uint4>(checkpoints),
                                 out<bf16>(dr),
                                 out<bf16>(dk),
                                 out<bf16>(dv),
                                 out<bf16>(dw),
                                 du,
                                 dstate_in},
                                scratch, stream);
  }
  return with_dtype(*p, [&](auto element) {
    using T = decltype(element);
    return scan_backward<T>({*p, in<T>(r), in<T>(k), in<T>(v), in<T>(w), in<T>(dy), u, dstate_out,
                             in<float>(checkpoints), out<T>(dr), out<T>(dk), out<T>(dv), out<T>(dw),
                             du, dstate_in, nullptr},
                            scratch, stream);
  });
}

const char* wkv6_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // extern "C"

// The launchers of norm.h.
#include "norm.cuh"

using namespace finchtune;

namespace {

bool valid(const LayerNorm& norm) {
  const int64_t bytes = norm.channels * (norm.dtype == ELEMENTWISE_FP32 ? 4 : 2);
  return norm.rows >= 1 && norm.channels >= 1 && bytes <= MOST_NORM_BYTES;
}

Stripes weight_stripes(const LayerNorm& norm) {
  return Stripes(norm.rows, norm.channels, 1, ADDED_NORM_STRIPE);
}

}  // namespace

extern "C" {

int finchtune_added_norm(const LayerNorm* norm, const void* x, const void* y, const void* weight,
                         const void* bias, void* total, void* normed, float* moments,
                         void* stream) {
  if (!valid(*norm)) return cudaErrorInvalidValue;
  const int64_t C = norm->channels;
  const auto wide = [&](int V) { return C % V == 0 && aligned(x, y, weight, bias, total, normed); };
  return with_vectors(norm->dtype, wide, [&](auto element, auto width) {
    using T = decltype(element);
    return launch(
        added_norm_kernel<T, decltype(width)::value>, norm->rows, ELEMENTWISE_THREADS,
        sizeof(NormShared) + C * sizeof(T), stream,
        AddedNormArgs<T>{norm->rows, C, norm->eps, in<T>(x), in<T>(y), in<T>(weight), in<T>(bias),
                         out<T>(total), out<T>(normed), out<float2>(moments)});
  });
}

size_t finchtune_added_norm_scratch_bytes(const LayerNorm* norm) {
  return weight_stripes(*norm).count() * 2 * norm->channels * sizeof(float);
}

int finchtune_added_norm_backward(const LayerNorm* norm, const void* total, const float* moments,
                                  const void* weight, const void* dnormed, const void* dtotal,
                                  void* dx, float* dparameters, void* scratch, void* stream) {
  if (!valid(*norm)) return cudaErrorInvalidValue;
  const int64_t C = norm->channels;
  const auto wide = [&](int V) {
    return C % V == 0 && aligned(total, weight, dnormed, dtotal, dx);
  };
  float* const parts = out<float>(scratch);
  const Stripes stripes = weight_stripes(*norm);
  const cudaError_t error = with_vectors(norm->dtype, wide, [&](auto element, auto width) {
    using T = decltype(element);
    const AddedNormBackwardArgs<T> args = {
        norm->rows,          C,         in<T>(total), in<T>(weight), in<T>(dnormed), in<T>(dtotal),
        in<float2>(moments), out<T>(dx)};
    const cudaError_t failed =
        launch(added_norm_backward_kernel<T, decltype(width)::value>, norm->rows,
               ELEMENTWISE_THREADS, sizeof(NormShared) + 2 * C * sizeof(T), stream, args);
    if (failed != cudaSuccess || dparameters == nullptr) return failed;
    return launch(added_norm_weight_kernel<T>, stripes.blocks(), ELEMENTWISE_THREADS, 0, stream,
                  AddedNormWeightArgs<T>{args, stripes, parts});
  });
  if (error != cudaSuccess || dparameters == nullptr) return error;
  return sum_parts(parts, dparameters, stripes.count(), 2 * C, stream);
}

}  // extern "C"

// How the launchers of elementwise.h choose a kernel's form and fill in its arguments.
#pragma once

#include "activations.cuh"
#include "cross_entropy.cuh"
#include "shards.cuh"
#include "token_mix.cuh"
#include "unpack.cuh"

namespace finchtune {
namespace {

bool divides(int64_t V) { return V > 0; }
template <typename... Sizes>
bool divides(int64_t V, int64_t size, Sizes... more) {
  return size % V == 0 && divides(V, more...);
}

bool all_aligned(const void* const* pointers, int n) {
  for (int i = 0; i < n; i++)
    if (!aligned(pointers[i])) return false;
  return true;
}

template <typename T>
TokenMixArgs<T> token_mix_args(const Shift& shift, Stripes stripes, int n, const void* x,
                               const void* before, const void* maa) {
  TokenMixArgs<T> args = {shift, stripes, n, in<T>(x), in<T>(before), in<T>(maa)};
  return args;
}

bool valid(const Shift& shift, int n) {
  return shift.rows >= 1 && shift.channels >= 1 && shift.n_seq >= 1 && n >= 1 &&
         n <= MOST_MIXTURES &&
         (shift.cu_seqlens != nullptr || shift.n_seq * shift.length == shift.rows);
}

int64_t mix_stripes(const Shift& shift) { return ceil_div(shift.rows, MIX_STRIPE); }

template <typename T>
GatedNormArgs<T> norm_args(const GatedNorm& norm) {
  return {norm.rows,
          norm.groups,
          norm.size,
          norm.eps,
          in<T>(norm.y),
          in<T>(norm.gate),
          in<T>(norm.weight),
          in<T>(norm.bias),
          nullptr,
          nullptr,
          nullptr,
          nullptr,
          nullptr};
}

int64_t norm_blocks(const GatedNorm& norm) { return ceil_div(norm.rows * norm.groups, NORM_UNITS); }

// The moments of all groups, then the parts of the gradients of weight and bias.
size_t moments_bytes(const GatedNorm& norm) { return norm.rows * norm.groups * sizeof(float2); }

template <typename F>
cudaError_t launch_elements(int dtype, int64_t count, const void* a, const void* b, const void* c,
                            void* first, void* second, void* stream) {
  if (count == 0) return cudaSuccess;
  const auto wide = [&](int V) { return divides(V, count) && aligned(a, b, c, first, second); };
  return with_vectors(dtype, wide, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int V = decltype(width)::value;
    return launch(
        elements_kernel<T, V, F>, ceil_div(count, ELEMENTWISE_THREADS * V), ELEMENTWISE_THREADS, 0,
        stream,
        ElementsArgs<T>{count, in<T>(a), in<T>(b), in<T>(c), out<T>(first), out<T>(second)});
  });
}

// f(element of the sums): fp32, or the element itself.
template <typename T, typename F>
cudaError_t with_sums(T element, int dtype, int dtype_of_sums, F f) {
  if (dtype_of_sums == ELEMENTWISE_FP32) return f(float());
  return dtype_of_sums == dtype ? f(element) : cudaErrorInvalidValue;
}

template <int V, typename T, typename S>
cudaError_t launch_shard_sums(const ShardsArgs<T, S>& args, void* stream) {
  return launch(shard_sums_kernel<T, S, V>, args.rows, ELEMENTWISE_THREADS,
                ELEMENTWISE_THREADS * V * sizeof(float), stream, args);
}

cudaError_t spread(int dtype, int dtype_of_s, int64_t rows, int64_t k, int64_t r, const void* x,
                   const void* s, void* result, bool gather, void* stream) {
  const auto wide = [&](int V) { return divides(V, k, r) && aligned(x, s, result); };
  return with_vectors(dtype, wide, [&](auto element, auto width) {
    constexpr int V = decltype(width)::value;
    return with_sums(element, dtype, dtype_of_s, [&](auto sum) {
      using T = decltype(element);
      using S = decltype(sum);
      const Stripes stripes(rows, k, V, 1);
      return launch(
          spread_kernel<T, S, V>, stripes.blocks(), ELEMENTWISE_THREADS, 0, stream,
          SpreadArgs<T, S>{stripes, rows, k, r, in<T>(x), in<S>(s), out<T>(result), gather});
    });
  });
}

template <typename T, int V, int KIND>
cudaError_t launch_unpack(const UnpackArgs<T>& args, void* stream) {
  const int64_t threads = ceil_div(args.count, UNPACKED);
  return launch(unpack_kernel<T, V, KIND>, ceil_div(threads, ELEMENTWISE_THREADS),
                ELEMENTWISE_THREADS, sizeof(UnpackTable), stream, args);
}

}  // namespace
}  // namespace finchtune

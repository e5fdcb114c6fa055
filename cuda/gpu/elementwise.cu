// The launchers of elementwise.h.
#include "elementwise_launch.cuh"

using namespace finchtune;

extern "C" {

int finchtune_token_mix(const Shift* shift, int n, const void* x, const void* before,
                        const void* maa, const void* const* blends, void* const* results,
                        void* stream) {
  if (!valid(*shift, n)) return cudaErrorInvalidValue;
  const auto wide = [&](int V) {
    return divides(V, shift->channels) && aligned(x, before, maa) && all_aligned(results, n) &&
           (blends == nullptr || all_aligned(blends, n));
  };
  return with_vectors(shift->dtype, wide, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int V = decltype(width)::value;
    const Stripes stripes(shift->rows, shift->channels, V, 1);
    TokenMixArgs<T> args = token_mix_args<T>(*shift, stripes, n, x, before, maa);
    args.has_blends = blends != nullptr;
    for (int j = 0; j < n; j++) {
      args.out[j] = out<T>(results[j]);
      if (blends != nullptr) args.blends[j] = in<T>(blends[j]);
    }
    return launch(token_mix_kernel<T, V>, stripes.blocks(), ELEMENTWISE_THREADS, 0, stream, args);
  });
}

size_t finchtune_token_mix_scratch_bytes(const Shift* shift, int n) {
  return mix_stripes(*shift) * n * shift->channels * sizeof(float);
}

int finchtune_token_mix_backward(const Shift* shift, int n, const void* x, const void* before,
                                 const void* maa, const void* const* dout, void* const* blends,
                                 void* sum, void* blended, float* dmaa, void* scratch,
                                 void* stream) {
  if (!valid(*shift, n)) return cudaErrorInvalidValue;
  const auto wide = [&](int V) {
    return divides(V, shift->channels) && aligned(x, before, maa, sum, blended, scratch) &&
           all_aligned(dout, n) && (blends == nullptr || all_aligned(blends, n));
  };
  const cudaError_t error = with_vectors(shift->dtype, wide, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int V = decltype(width)::value;
    const Stripes stripes(shift->rows, shift->channels, V, dmaa != nullptr ? MIX_STRIPE : 1);
    TokenMixArgs<T> args = token_mix_args<T>(*shift, stripes, n, x, before, maa);
    args.has_blends = blends != nullptr;
    args.sum = out<T>(sum), args.blended = out<T>(blended), args.dmaa = out<float>(scratch);
    for (int j = 0; j < n; j++) {
      args.dout[j] = in<T>(dout[j]);
      if (blends != nullptr) args.blends[j] = args.out[j] = out<T>(blends[j]);
    }
    const auto kernel = dmaa != nullptr ? token_mix_backward_kernel<T, V, true>
                                        : token_mix_backward_kernel<T, V, false>;
    return launch(kernel, stripes.blocks(), ELEMENTWISE_THREADS, 0, stream, args);
  });
  if (error != cudaSuccess || dmaa == nullptr) return error;
  return sum_parts(in<float>(scratch), dmaa, mix_stripes(*shift), n * shift->channels, stream);
}

int finchtune_shift_backward(const Shift* shift, const void* sum, const void* blended,
                             const void* more, const void* maa, void* dx, void* dbefore,
                             void* stream) {
  if (!valid(*shift, 1)) return cudaErrorInvalidValue;
  const auto wide = [&](int V) {
    return divides(V, shift->channels) && aligned(sum, blended, more, maa, dx, dbefore);
  };
  return with_vectors(shift->dtype, wide, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int V = decltype(width)::value;
    const Stripes stripes(shift->rows, shift->channels, V, 1);
    return launch(shift_backward_kernel<T, V>, stripes.blocks(), ELEMENTWISE_THREADS, 0, stream,
                  ShiftArgs<T>{*shift, stripes, in<T>(sum), in<T>(blended), in<T>(more), in<T>(maa),
                               out<T>(dx), out<T>(dbefore)});
  });
}

int finchtune_gated_norm(const GatedNorm* norm, void* result, void* stream) {
  const auto wide = [&](int V) {
    return divides(V, norm->size) && aligned(norm->y, norm->gate, norm->weight, norm->bias, result);
  };
  return with_vectors(norm->dtype, wide, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int V = decltype(width)::value;
    GatedNormArgs<T> args = norm_args<T>(*norm);
    args.out = out<T>(result);
    return launch(gated_norm_kernel<T, V>, norm_blocks(*norm), ELEMENTWISE_THREADS, 0, stream,
                  args);
  });
}

size_t finchtune_gated_norm_scratch_bytes(const GatedNorm* norm) {
  const int64_t stripes = ceil_div(norm->rows, NORM_STRIPE);
  return moments_bytes(*norm) + stripes * 2 * norm->groups * norm->size * sizeof(float);
}

int finchtune_gated_norm_backward(const GatedNorm* norm, const void* dout, void* dy, void* dgate,
                                  float* dparameters, void* scratch, void* stream) {
  const auto wide = [&](int V) {
    return divides(V, norm->size) &&
           aligned(norm->y, norm->gate, norm->weight, norm->bias, dout, dy, dgate);
  };
  const int64_t C = norm->groups * norm->size;
  float* const parts = reinterpret_cast<float*>(static_cast<char*>(scratch) + moments_bytes(*norm));
  const Stripes stripes(norm->rows, C, 1, NORM_STRIPE);
  const cudaError_t error = with_vectors(norm->dtype, wide, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int V = decltype(width)::value;
    GatedNormArgs<T> args = norm_args<T>(*norm);
    args.dout = in<T>(dout), args.dy = out<T>(dy), args.dgate = out<T>(dgate);
    if (dparameters != nullptr) args.moments = out<float2>(scratch);
    const cudaError_t failed = launch(gated_norm_backward_kernel<T, V>, norm_blocks(*norm),
                                      ELEMENTWISE_THREADS, 0, stream, args);
    if (failed != cudaSuccess || dparameters == nullptr) return failed;
    return launch(norm_weight_kernel<T>, stripes.blocks(), ELEMENTWISE_THREADS, 0, stream,
                  NormWeightArgs<T>{args, stripes, parts});
  });
  if (error != cudaSuccess || dparameters == nullptr) return error;
  return sum_parts(parts, dparameters, stripes.count(), 2 * C, stream);
}

int finchtune_squared_relu(int dtype, int64_t count, const void* x, void* y, void* stream) {
  return launch_elements<SquaredRelu>(dtype, count, x, nullptr, nullptr, y, nullptr, stream);
}

int finchtune_squared_relu_backward(int dtype, int64_t count, const void* dy, const void* y,
                                    void* dx, void* stream) {
  return launch_elements<SquaredReluBackward>(dtype, count, dy, y, nullptr, dx, nullptr, stream);
}

int finchtune_sigmoid_gate(int dtype, int64_t count, const void* gate, const void* y, void* result,
                           void* stream) {
  return launch_elements<SigmoidGate>(dtype, count, gate, y, nullptr, result, nullptr, stream);
}

int finchtune_sigmoid_gate_backward(int dtype, int64_t count, const void* dout, const void* gate,
                                    const void* y, void* dgate, void* dy, void* stream) {
  return launch_elements<SigmoidGateBackward>(dtype, count, dout, gate, y, dgate, dy, stream);
}

int finchtune_shard_sums(int dtype, int dtype_of_sums, int64_t rows, int64_t k, int64_t r,
                         const void* x, void* sums, void* stream) {
  if (rows < 1 || k < 1 || r < 1) return cudaErrorInvalidValue;
  const auto wide = [&](int V) { return divides(V, k, r) && aligned(x, sums); };
  return with_vectors(dtype, wide, [&](auto element, auto width) {
    return with_sums(element, dtype, dtype_of_sums, [&](auto sum) {
      using T = decltype(element);
      using S = decltype(sum);
      return launch_shard_sums<decltype(width)::value>(
          ShardsArgs<T, S>{rows, k, r, in<T>(x), nullptr, nullptr, out<S>(sums)}, stream);
    });
  });
}

int finchtune_add_to_shards(int dtype, int dtype_of_s, int64_t rows, int64_t k, int64_t r, void* x,
                            const void* s, void* stream) {
  if (rows < 1 || k < 1 || r < 1) return cudaErrorInvalidValue;
  return spread(dtype, dtype_of_s, rows, k, r, x, s, x, false, stream);
}

int finchtune_move_shards(int dtype, int64_t rows, int64_t n, int64_t r, const void* x,
                          const void* u, void* moved, float* sums, void* stream) {
  if (rows < 1 || n < 1 || r < 1) return cudaErrorInvalidValue;
  const auto wide = [&](int V) { return divides(V, r) && aligned(x, u, moved, sums); };
  return with_vectors(dtype, wide, [&](auto element, auto width) {
    using T = decltype(element);
    return launch_shard_sums<decltype(width)::value>(
        ShardsArgs<T, float>{rows, n * r, r, in<T>(x), in<T>(u), out<T>(moved), sums}, stream);
  });
}

int finchtune_gather_shards(int dtype, int64_t rows, int64_t n, int64_t r, const void* dx,
                            const float* sums, void* q, void* stream) {
  if (rows < 1 || n < 1 || r < 1) return cudaErrorInvalidValue;
  return spread(dtype, ELEMENTWISE_FP32, rows, n * r, r, dx, sums, q, true, stream);
}

int finchtune_unpack(int dtype, int kind, const UnpackTable* table, int64_t count,
                     const void* codes, const float* scales, void* result, void* stream) {
  if (count < 1) return cudaErrorInvalidValue;
  if (!aligned(codes)) return cudaErrorMisalignedAddress;
  const auto wide = [&](int V) { return divides(V, count) && aligned(result); };
  return with_vectors(dtype, wide, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int V = decltype(width)::value;
    UnpackArgs<T> args = {count, in<unsigned char>(codes), scales, {}, out<T>(result)};
    if (table != nullptr) args.table = *table;
    if (kind == UNPACK_TABLE) return launch_unpack<T, V, UNPACK_TABLE>(args, stream);
    if (kind == UNPACK_INT8) return launch_unpack<T, V, UNPACK_INT8>(args, stream);
    return launch_unpack<T, V, UNPACK_E4M3>(args, stream);
  });
}

int finchtune_cross_entropy(int dtype, int64_t rows, int64_t n, void* logits, const int64_t* labels,
                            float l2wrap, float* losses, void* stream) {
  if (rows < 1 || n < 1) return cudaErrorInvalidValue;
  const auto wide = [&](int V) { return divides(V, n) && aligned(logits); };
  return with_vectors(dtype, wide, [&](auto element, auto width) {
    using T = decltype(element);
    return launch(cross_entropy_kernel<T, decltype(width)::value>, rows, LOSS_THREADS,
                  LOSS_THREADS * sizeof(Largest), stream,
                  CrossEntropyArgs<T>{rows, n, out<T>(logits), labels, l2wrap, losses});
  });
}

}  // extern "C"

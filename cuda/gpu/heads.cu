// The launchers of heads.h.
#include "heads.cuh"

namespace finchtune {
namespace {

bool valid(const Heads& heads, int n_weights) {
  return heads.tokens >= 1 && heads.heads >= 1 && heads.size >= 1 && heads.n_rows <= MOST_ROWS &&
         heads.n_weights == n_weights && heads.n_out <= MOST_RESULTS;
}

bool moves_whole(const Heads& heads, int V) {
  if (heads.size % V != 0) return false;
  for (int i = 0; i < heads.n_rows; i++)
    if (!aligned(heads.rows[i])) return false;
  for (int i = 0; i < heads.n_weights; i++)
    if (!aligned(heads.weights[i])) return false;
  for (int i = 0; i < heads.n_out; i++)
    if (!aligned(heads.out[i])) return false;
  return true;
}

template <typename T>
HeadArgs<T> head_args(const Heads& heads, HeadSums* sums) {
  HeadArgs<T> args = {heads.tokens, heads.heads, heads.size, heads.eps, heads.n_rows};
  for (int i = 0; i < heads.n_rows; i++) args.rows[i] = in<T>(heads.rows[i]);
  for (int i = 0; i < heads.n_weights; i++) args.weights[i] = in<T>(heads.weights[i]);
  for (int i = 0; i < heads.n_out; i++) args.out[i] = out<T>(heads.out[i]);
  args.sums = sums;
  return args;
}

// choose(an element, a width) gives the kernel.
template <typename F>
cudaError_t launch_heads(const Heads& heads, HeadSums* sums, void* stream, F choose) {
  const auto wide = [&](int V) { return moves_whole(heads, V); };
  return with_vectors(heads.dtype, wide, [&](auto element, auto width) {
    return launch(choose(element, width), ceil_div(heads.tokens * heads.heads, HEAD_UNITS),
                  ELEMENTWISE_THREADS, 0, stream, head_args<decltype(element)>(heads, sums));
  });
}

// After a backward that left `sums`, which the parts of the gradients follow in the scratch memory.
template <typename Weights>
cudaError_t sum_weights(const Heads& heads, float* dweights, HeadSums* sums, void* stream) {
  float* const parts = reinterpret_cast<float*>(sums + heads.tokens * heads.heads);
  const int64_t C = heads.heads * heads.size;
  const Stripes stripes(heads.tokens, C, 1, HEAD_STRIPE);
  const auto alone = [](int) { return false; };
  const cudaError_t error = with_vectors(heads.dtype, alone, [&](auto element, auto) {
    using T = decltype(element);
    return launch(head_weights_kernel<T, Weights>, stripes.blocks(), ELEMENTWISE_THREADS, 0, stream,
                  HeadWeightArgs<T>{head_args<T>(heads, sums), stripes, parts});
  });
  if (error != cudaSuccess) return error;
  return sum_parts(parts, dweights, stripes.count(), Weights::COUNT * C, stream);
}

template <typename Weights, typename F>
cudaError_t backward(const Heads& heads, float* dweights, void* scratch, void* stream, F choose) {
  if (!valid(heads, Weights::COUNT)) return cudaErrorInvalidValue;
  HeadSums* const sums = dweights != nullptr ? out<HeadSums>(scratch) : nullptr;
  const cudaError_t error = launch_heads(heads, sums, stream, choose);
  if (error != cudaSuccess || dweights == nullptr) return error;
  return sum_weights<Weights>(heads, dweights, sums, stream);
}

}  // namespace
}  // namespace finchtune

using namespace finchtune;

extern "C" {

int finchtune_wkv7_inputs(const Heads* heads, void* stream) {
  if (!valid(*heads, 2)) return cudaErrorInvalidValue;
  return launch_heads(*heads, nullptr, stream, [](auto element, auto width) {
    return wkv7_inputs_kernel<decltype(element), decltype(width)::value>;
  });
}

int finchtune_wkv7_inputs_backward(const Heads* heads, float* dweights, void* scratch,
                                   void* stream) {
  return backward<Wkv7InputsWeights>(
      *heads, dweights, scratch, stream, [](auto element, auto width) {
        return wkv7_inputs_backward_kernel<decltype(element), decltype(width)::value>;
      });
}

int finchtune_bonus_norm(const Heads* heads, void* stream) {
  if (!valid(*heads, 3)) return cudaErrorInvalidValue;
  return launch_heads(*heads, nullptr, stream, [](auto element, auto width) {
    return bonus_norm_kernel<decltype(element), decltype(width)::value>;
  });
}

int finchtune_bonus_norm_backward(const Heads* heads, float* dweights, void* scratch,
                                  void* stream) {
  return backward<BonusNormWeights>(
      *heads, dweights, scratch, stream, [](auto element, auto width) {
        return bonus_norm_backward_kernel<decltype(element), decltype(width)::value>;
      });
}

size_t finchtune_heads_scratch_bytes(const Heads* heads) {
  const int64_t C = heads->heads * heads->size, stripes = ceil_div(heads->tokens, HEAD_STRIPE);
  return heads->tokens * heads->heads * sizeof(HeadSums) +
         stripes * heads->n_weights * C * sizeof(float);
}

}  // extern "C"

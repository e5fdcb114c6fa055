// The rival of scripts/bench/wkv.py: WKV6 in the style of the official RWKV-6 kernels. A thread
// block does one (batch, head), token by token; a thread keeps one row or column of the state in
// registers. Backward goes over the tokens once for each of dr, dk and dv. The gradient of the decay
// is a running sum of r*dr - k*dk, less work than the official kernel's, and inexact where strong
// and weak decays meet. No initial and no final state. Only for comparison: training never uses it.
#include <cuda_runtime.h>

#include "problem.cuh"

namespace sequential {

using wkv6::from_float;
using wkv6::to_float;

constexpr int N = 64;

template <typename T>
struct Args {
  Wkv6Problem problem;
  const T *r, *k, *v, *w, *dy;
  const float* u;
  T *y, *dr, *dk, *dv, *dw;
  float* du;                       // (B, H, N)
  float *r_times_dr, *k_times_dk;  // (B, T, H, N), without the current token's bonus
};

// One token of a head: what the threads share.
struct Token {
  float a[N], b[N], decay[N], u[N];
};

template <typename T>
__device__ int64_t offset_of(const Args<T>& args, int64_t t) {
  const int64_t batch = blockIdx.x / args.problem.H, head = blockIdx.x % args.problem.H;
  return ((batch * args.problem.T + t) * args.problem.H + head) * N + threadIdx.x;
}

template <typename T>
__device__ float bonus_of(const Args<T>& args) {
  return args.u[blockIdx.x % args.problem.H * N + threadIdx.x];
}

// Publishes two values of this thread's channel, after all have read the last ones.
__device__ __forceinline__ void publish(Token& token, float a, float b) {
  __syncthreads();
  token.a[threadIdx.x] = a;
  token.b[threadIdx.x] = b;
}

template <typename T>
__device__ __forceinline__ float decay_at(const Args<T>& args, int64_t at) {
  return expf(-expf(to_float(args.w[at])));
}

template <typename T>
__global__ void __launch_bounds__(N) forward_kernel(Args<T> args) {
  Token& token = wkv6::shared_memory<Token>();
  float state[N] = {};  // of this thread's value channel
  token.u[threadIdx.x] = bonus_of(args);
  for (int64_t t = 0; t < args.problem.T; t++) {
    const int64_t at = offset_of(args, t);
    publish(token, to_float(args.r[at]), to_float(args.k[at]));
    token.decay[threadIdx.x] = decay_at(args, at);
    __syncthreads();
    const float v = to_float(args.v[at]);
    float y = 0.0f;
#pragma unroll
    for (int n = 0; n < N; n++) {
      const float kv = token.b[n] * v;
      y += token.a[n] * (state[n] + token.u[n] * kv);
      state[n] = token.decay[n] * state[n] + kv;
    }
    args.y[at] = from_float<T>(y);
  }
}

template <typename T>
__global__ void __launch_bounds__(N) dr_kernel(Args<T> args) {
  Token& token = wkv6::shared_memory<Token>();
  float state[N] = {};  // of this thread's key channel
  const float u = bonus_of(args);
  float du = 0.0f;
  for (int64_t t = 0; t < args.problem.T; t++) {
    const int64_t at = offset_of(args, t);
    publish(token, to_float(args.v[at]), to_float(args.dy[at]));
    __syncthreads();
    const float r = to_float(args.r[at]), k = to_float(args.k[at]), d = decay_at(args, at);
    float dr = 0.0f, v_dy = 0.0f;
#pragma unroll
    for (int n = 0; n < N; n++) {
      dr += token.b[n] * state[n];
      v_dy += token.a[n] * token.b[n];
      state[n] = d * state[n] + k * token.a[n];
    }
    args.r_times_dr[at] = r * dr;
    args.dr[at] = from_float<T>(dr + u * k * v_dy);
    du += r * k * v_dy;
  }
  args.du[static_cast<int64_t>(blockIdx.x) * N + threadIdx.x] = du;
}

template <typename T>
__global__ void __launch_bounds__(N) dk_kernel(Args<T> args) {
  Token& token = wkv6::shared_memory<Token>();
  float gradient[N] = {};  // of this thread's key channel of the state
  const float u = bonus_of(args);
  for (int64_t t = args.problem.T - 1; t >= 0; t--) {
    const int64_t at = offset_of(args, t);
    publish(token, to_float(args.v[at]), to_float(args.dy[at]));
    __syncthreads();
    const float r = to_float(args.r[at]), k = to_float(args.k[at]), d = decay_at(args, at);
    float dk = 0.0f, v_dy = 0.0f;
#pragma unroll
    for (int n = 0; n < N; n++) {
      dk += token.a[n] * gradient[n];
      v_dy += token.a[n] * token.b[n];
      gradient[n] = d * gradient[n] + r * token.b[n];
    }
    args.k_times_dk[at] = k * dk;
    args.dk[at] = from_float<T>(dk + u * r * v_dy);
  }
}

template <typename T>
__global__ void __launch_bounds__(N) dv_kernel(Args<T> args) {
  Token& token = wkv6::shared_memory<Token>();
  float gradient[N] = {};  // of this thread's value channel of the state
  token.u[threadIdx.x] = bonus_of(args);
  for (int64_t t = args.problem.T - 1; t >= 0; t--) {
    const int64_t at = offset_of(args, t);
    publish(token, to_float(args.r[at]), to_float(args.k[at]));
    token.decay[threadIdx.x] = decay_at(args, at);
    __syncthreads();
    const float dy = to_float(args.dy[at]);
    float dv = 0.0f;
#pragma unroll
    for (int n = 0; n < N; n++) {
      const float r_dy = token.a[n] * dy;
      dv += token.b[n] * (gradient[n] + token.u[n] * r_dy);
      gradient[n] = token.decay[n] * gradient[n] + r_dy;
    }
    args.dv[at] = from_float<T>(dv);
  }
}

template <typename T>
__global__ void __launch_bounds__(N) dw_kernel(Args<T> args) {
  float later = 0.0f;
  for (int64_t t = args.problem.T - 1; t >= 0; t--) {
    const int64_t at = offset_of(args, t);
    later -= args.k_times_dk[at];
    args.dw[at] = from_float<T>(-expf(to_float(args.w[at])) * later);
    later += args.r_times_dr[at];
  }
}

template <typename T>
int launch(void (*kernel)(Args<T>), const Args<T>& args, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(args.problem.B * args.problem.H));
  config.blockDim = dim3(N);
  config.dynamicSmemBytes = sizeof(Token);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <typename T>
int backward(const Args<T>& args, void* stream) {
  for (auto kernel : {dr_kernel<T>, dk_kernel<T>, dv_kernel<T>, dw_kernel<T>}) {
    if (const int error = launch(kernel, args, stream)) return error;
  }
  return 0;
}

}  // namespace sequential

// Pointers of Args in its order, the problem's dtype fp32 or bf16; each returns a cudaError_t.
#define ARGUMENTS(T)   \
  {*p,                 \
   (const T*)x[0],     \
   (const T*)x[1],     \
   (const T*)x[2],     \
   (const T*)x[3],     \
   (const T*)x[4],     \
   (const float*)x[5], \
   (T*)x[6],           \
   (T*)x[7],           \
   (T*)x[8],           \
   (T*)x[9],           \
   (T*)x[10],          \
   (float*)x[11],      \
   (float*)x[12],      \
   (float*)x[13]}

extern "C" int sequential_forward(const Wkv6Problem* p, void* const* x, void* stream) {
  using namespace sequential;
  if (p->dtype == WKV6_FP32) return launch<float>(forward_kernel<float>, ARGUMENTS(float), stream);
  return launch<__nv_bfloat16>(forward_kernel<__nv_bfloat16>, ARGUMENTS(__nv_bfloat16), stream);
}

extern "C" int sequential_backward(const Wkv6Problem* p, void* const* x, void* stream) {
  if (p->dtype == WKV6_FP32) return sequential::backward<float>(ARGUMENTS(float), stream);
  return sequential::backward<__nv_bfloat16>(ARGUMENTS(__nv_bfloat16), stream);
}

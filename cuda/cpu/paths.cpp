// The CPU kernels, compiled once for each instruction set. Which form runs is decided at run time.

#include "paths.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

// Only GCC switches the instruction set inside a file; other compilers get the portable form,
// which is the compiler's default target (on Arm, that has vectors).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define FINCHTUNE_X86_PATHS 1
#endif

namespace finchtune {

#ifdef FINCHTUNE_X86_PATHS
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#define LANES 16
#include "kernels.h"
#undef LANES
bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("fma");
}
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define LANES 8
#include "kernels.h"
#undef LANES
bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
}  // namespace avx2
#pragma GCC pop_options
#endif

namespace portable {
#define LANES 4
#include "kernels.h"
#undef LANES
bool supported() { return true; }
}  // namespace portable

const CpuPath kCpuPaths[] = {
#ifdef FINCHTUNE_X86_PATHS
    {"avx512", avx512::supported, avx512::kKernels},
    {"avx2", avx2::supported, avx2::kKernels},
#endif
    {"portable", portable::supported, portable::kKernels},
};
const int kCpuPathCount = sizeof kCpuPaths / sizeof kCpuPaths[0];

}  // namespace finchtune

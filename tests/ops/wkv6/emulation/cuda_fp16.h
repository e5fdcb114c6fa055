// fp16 on the CPU, by the conversion instructions or routines of the compiler's own type.
#pragma once

#include <cstdint>

struct __half {
  _Float16 value;
};

inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

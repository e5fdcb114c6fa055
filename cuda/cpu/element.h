// What the elements of a tensor are.
#pragma once

#include <cstdint>

namespace finchtune {

enum class Element { kFloat32, kBfloat16 };

}  // namespace finchtune

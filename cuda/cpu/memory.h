// Elements in memory, fp32 or bf16, and the way into fp32 and back. Part of kernels.h.

static inline void copy(float* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    *reinterpret_cast<UnalignedVec*>(to + i) = *reinterpret_cast<const UnalignedVec*>(from + i);
  if (i < n) std::memcpy(to + i, from + i, (n - i) * sizeof(float));
}

// In memory a row is fp32 or bf16, the upper half of an fp32.
static inline void load_row(float* row, const void* data, Element element, int64_t at, int64_t n) {
  if (element == Element::kFloat32) {
    copy(row, static_cast<const float*>(data) + at, n);
    return;
  }
  const uint16_t* source = static_cast<const uint16_t*>(data) + at;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits = static_cast<uint32_t>(source[i]) << 16;
    std::memcpy(row + i, &bits, sizeof bits);
  }
}

static inline void store_row(const float* row, void* data, Element element, int64_t at, int64_t n) {
  if (element == Element::kFloat32) {
    copy(static_cast<float*>(data) + at, row, n);
    return;
  }
  uint16_t* target = static_cast<uint16_t*>(data) + at;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, row + i, sizeof bits);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    target[i] = nan ? 0x7fc0 : nearest_even;
  }
}

// E4M3 weights with UE8M0 scales as bf16, the format that they are multiplied in: what converting them beforehand
// gives, bit for bit.
//
// A code's exponent and mantissa in the places of those of bf16 are its value times 2^-120, subnormals among them. One
// product with 2^120 times the scale rounds as the exact value does, where it is not exact: results below 2^-126 and
// infinite ones. Of scales above 2^7 that factor is too large for bf16; there 2^120 comes first, which is exact.
#pragma once

#include "common/vector.cuh"

namespace dsv4 {

// What placed codes are multiplied with.
struct Bf16Scale {
  uint32_t factor;  // in both halves
  bool large;       // after 2^120

  __device__ __forceinline__ explicit Bf16Scale(float scale) : large(!(scale <= 0x1p7f)) {
    const float value = large ? scale : scale * 0x1p120f;
    factor = pack_bf16x2(value, value);
  }
};

// Codes i and i + 2 of four E4M3 codes as bf16, each times 2^-120.
__device__ __forceinline__ uint32_t place_e4m3(uint32_t word, int i) {
  const uint32_t sign = (i == 0 ? word << 8 : word) & 0x80008000u;
  const uint32_t moved = i == 0 ? word << 4 : word >> 4;
  return sign | (moved & 0x07F007F0u);
}

// The same times their scale.
template <bool kLargeScale>
__device__ __forceinline__ uint32_t scale_e4m3(uint32_t word, int i, uint32_t factor) {
  constexpr uint32_t kUnit = 0x7B807B80u;  // 2^120
  const uint32_t placed = place_e4m3(word, i);
  return mul_bf16x2(kLargeScale ? mul_bf16x2(placed, kUnit) : placed, factor);
}

// The words of one chunk (16 values of k) in rows row and row + 8, see weight_fragments.cuh -> a fragment, whose k are
// the chunk's even values and then its odd ones.
template <bool kLargeScale>
__device__ __forceinline__ void e4m3_bf16_fragment(uint32_t (&a)[4], uint32_t upper, uint32_t lower, uint32_t factor) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a[2 * i] = scale_e4m3<kLargeScale>(upper, i, factor);
    a[2 * i + 1] = scale_e4m3<kLargeScale>(lower, i, factor);
  }
}

// Eight values of x -> their even and their odd ones, as the fragments want them.
__device__ __forceinline__ void split_even_odd(uint2& even, uint2& odd, const uint4& x) {
  even = {__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410)};
  odd = {__byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632)};
}

}  // namespace dsv4

// E4M3 weights with UE8M0 scales as bf16, the format that they are multiplied in: what converting them beforehand gives,
// bit for bit.
//
// A code's exponent and mantissa in the places of those of bf16 are its value times 2^-120, subnormals among them. One
// product with 2^120 times the scale rounds as the exact value does, where it is not exact: results below 2^-126 and
// infinite ones. Of scales above 2^7 that factor is too large for bf16; there 2^120 comes first, which is exact.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/ptx.cuh"

namespace dsv4 {

// What codes in the places of bf16 are multiplied with.
struct Bf16Scale {
  __nv_bfloat162 factor;
  bool large;  // after 2^120

  __device__ __forceinline__ explicit Bf16Scale(float scale)
      : factor(__float2bfloat162_rn(scale <= 0x1p7f ? scale * 0x1p120f : scale)), large(!(scale <= 0x1p7f)) {}
};

// The even and the odd ones of a word's codes, (0, 2) and (1, 3), which are taken apart in place.
struct Bf16Pairs {
  uint32_t even, odd;
};

// Codes in bits 8 .. 15 and 24 .. 31 of `high`, and in bits 4 .. 11 and 20 .. 27 of `low` -> their bits in bf16's places.
__device__ __forceinline__ uint32_t place_e4m3(uint32_t high, uint32_t low) {
  return (high & 0x80008000u) | (low & 0x07F007F0u);
}

template <bool kLargeScale>
__device__ __forceinline__ uint32_t scale_placed(uint32_t placed, __nv_bfloat162 factor) {
  __nv_bfloat162 values = reinterpret_cast<const __nv_bfloat162&>(placed);
  if constexpr (kLargeScale) values = __hmul2_rn(values, __float2bfloat162_rn(0x1p120f));
  values = __hmul2_rn(values, factor);
  return reinterpret_cast<const uint32_t&>(values);
}

// Four codes times their scale.
template <bool kLargeScale>
__device__ __forceinline__ Bf16Pairs e4m3_bf16(uint32_t codes, __nv_bfloat162 factor) {
  return {scale_placed<kLargeScale>(place_e4m3(codes << 8, codes << 4), factor),
          scale_placed<kLargeScale>(place_e4m3(codes, codes >> 4), factor)};
}

// The words of one chunk (16 values of k) in rows row and row + 8, see weight_fragments.cuh -> a fragment, whose k are
// the chunk's even values and then its odd ones.
template <bool kLargeScale>
__device__ __forceinline__ void e4m3_bf16_fragment(uint32_t (&a)[4], uint32_t upper, uint32_t lower,
                                                   __nv_bfloat162 factor) {
  const Bf16Pairs up = e4m3_bf16<kLargeScale>(upper, factor), low = e4m3_bf16<kLargeScale>(lower, factor);
  a[0] = up.even, a[1] = low.even, a[2] = up.odd, a[3] = low.odd;
}

// Eight values of x -> their even and their odd ones, as the fragments want them.
__device__ __forceinline__ void split_even_odd(uint2& even, uint2& odd, const uint4& x) {
  even = {__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410)};
  odd = {__byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632)};
}

}  // namespace dsv4

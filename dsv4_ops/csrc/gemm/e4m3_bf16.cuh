// E4M3 weights with UE8M0 scales as bf16, the format that they are multiplied in: what converting them beforehand gives,
// bit for bit.
//
// A code's exponent and mantissa in the places of those of bf16 are the value times 2^-120, subnormals among them. The
// product with 2^120 is exact and so is a normal one with the scale; a product with a scale that makes it subnormal in
// bf16, infinite or NaN is rounded once, as the exact value is.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/ptx.cuh"

namespace dsv4 {

// A word's codes are taken apart in place: the even ones (0, 2) and the odd ones (1, 3) are a pair each.
struct Bf16Pairs {
  uint32_t even, odd;
};

// Code times 2^-120, sign included, of the codes in bits 8 .. 15 and 24 .. 31 of `high`; the same codes lie in bits
// 4 .. 11 and 20 .. 27 of `low`.
__device__ __forceinline__ uint32_t place_e4m3(uint32_t high, uint32_t low) {
  return (high & 0x80008000u) | (low & 0x07F007F0u);
}

__device__ __forceinline__ uint32_t scale_bf16(uint32_t placed, __nv_bfloat162 scale) {
  constexpr uint32_t kUnit = 0x7B807B80u;  // 2^120
  const __nv_bfloat162 values =
      __hmul2_rn(reinterpret_cast<const __nv_bfloat162&>(placed), reinterpret_cast<const __nv_bfloat162&>(kUnit));
  const __nv_bfloat162 scaled = __hmul2_rn(values, scale);
  return reinterpret_cast<const uint32_t&>(scaled);
}

// Four codes times their scale.
__device__ __forceinline__ Bf16Pairs e4m3_bf16(uint32_t codes, __nv_bfloat162 scale) {
  return {scale_bf16(place_e4m3(codes << 8, codes << 4), scale), scale_bf16(place_e4m3(codes, codes >> 4), scale)};
}

// The words of one chunk (16 values of k) in rows row and row + 8, see weight_fragments.cuh -> a fragment, whose k are
// the chunk's even values and then its odd ones.
__device__ __forceinline__ void e4m3_bf16_fragment(uint32_t (&a)[4], uint32_t upper, uint32_t lower,
                                                   __nv_bfloat162 scale) {
  const Bf16Pairs up = e4m3_bf16(upper, scale), low = e4m3_bf16(lower, scale);
  a[0] = up.even, a[1] = low.even, a[2] = up.odd, a[3] = low.odd;
}

// Eight values of x -> their even and their odd ones, as the fragments want them.
__device__ __forceinline__ void split_even_odd(uint2& even, uint2& odd, const uint4& x) {
  even = {__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410)};
  odd = {__byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632)};
}

}  // namespace dsv4

// Number formats of DeepSeek-V4, bit for bit those of dsv4_ops/ops/formats.py.
//
// E2M1   4 bits: 0 .5 1 1.5 2 3 4 6 and a sign (bit 3); two codes a byte, the even element in the low nibble
// E4M3   8 bits, largest finite value 448
// UE8M0  8 bits, value 2^(byte - 127), 255 is NaN
//
// Build without --use_fast_math: scales that are no powers of two need IEEE division.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"

namespace dsv4 {

constexpr float kE2m1Max = 6.0f;
constexpr float kE4m3Max = 448.0f;
constexpr float kFp8AmaxFloor = 1e-4f;                // smallest amax that an FP8 group is scaled for
constexpr float kMxfp4AmaxFloor = 6.0f * 0x1p-126f;   // smallest amax of an MXFP4 group
constexpr float kNvfp4ScaleFloor = 0x1p-126f;         // smallest global scale of NVFP4
constexpr float kNvfp4Largest = kE2m1Max * kE4m3Max;  // 2688: largest code times largest block scale

// max(value, floor) where NaN stays NaN, as torch's clamp_min.
__device__ __forceinline__ float clamp_min(float value, float floor) { return value < floor ? floor : value; }

// ---- UE8M0 ----

// Positive normal fp32 -> byte of the smallest power of two that is >= it; infinity and NaN give 255.
__device__ __forceinline__ uint32_t ceil_ue8m0(float value) {
  const uint32_t bits = __float_as_uint(value) & 0x7FFFFFFFu;
  return min((bits + 0x7FFFFFu) >> 23, 255u);
}

// UE8M0 byte -> fp32. Byte 0 is 2^-127, a subnormal, and 255 is NaN: both set bit 22.
__device__ __forceinline__ float decode_ue8m0(uint32_t byte) {
  return __uint_as_float((byte << 23) + (byte == 0 || byte == 255 ? 1u << 22 : 0u));
}

// 1 / decode_ue8m0(byte) for the bytes 1 .. 253 and 255 that a group's scale can have: exact, so that a product with it
// is the quotient that the reference computes.
__device__ __forceinline__ float invert_ue8m0(uint32_t byte) {
  return __uint_as_float(byte == 255 ? 0x7FC00000u : (254u - byte) << 23);
}

// amax of a group -> UE8M0 byte of 2^ceil(log2(max(amax, 1e-4) / 448)).
__device__ __forceinline__ uint32_t fp8_group_scale(float amax) {
  return ceil_ue8m0(clamp_min(amax, kFp8AmaxFloor) * (1.0f / kE4m3Max));
}

// amax of a group -> UE8M0 byte of 2^ceil(log2(max(amax, 6 * 2^-126) / 6)).
__device__ __forceinline__ uint32_t mxfp4_group_scale(float amax) {
  return ceil_ue8m0(clamp_min(amax, kMxfp4AmaxFloor) * (1.0f / kE2m1Max));
}

// ---- NVFP4 ----

// amax -> the global scale max(amax / 2688, 2^-126), which maps it to the largest code times the largest block scale.
__device__ __forceinline__ float nvfp4_global_scale(float amax) {
  return clamp_min(__fdiv_rn(amax, kNvfp4Largest), kNvfp4ScaleFloor);
}

// ---- E4M3 ----

// Two values -> two codes, nearest even, saturating at 448; `low` in bits 0..7.
__device__ __forceinline__ uint32_t encode_e4m3x2(float low, float high) { return ptx::cvt_e4m3x2(low, high); }

__device__ __forceinline__ uint32_t encode_e4m3(float value) { return encode_e4m3x2(value, 0.0f) & 0xFFu; }

__device__ __forceinline__ float2 decode_e4m3x2(uint32_t codes) {
  return __half22float2(ptx::cvt_half2(static_cast<uint16_t>(codes)));
}

__device__ __forceinline__ float decode_e4m3(uint32_t code) { return decode_e4m3x2(code & 0xFFu).x; }

// ---- E2M1 ----

// Magnitude -> bits of the fp32 number 2^23 + code: nearest, ties to even code, saturating at 6; NaN gives code 0.
//
// The code is the magnitude on a scale that is bent twice, 2m up to m = 2, m + 2 up to 4 and m / 2 + 4 up to 6, rounded
// to an integer. Each piece is saturated to [0, 1] and worth 4, 2 or 1 codes; its sum with 2^23 rounds, ties to even.
// All products and differences that are not saturated are exact, and of the pieces at most one is no integer.
__device__ __forceinline__ uint32_t round_e2m1(float magnitude) {
  const float upper = __saturatef(__fmaf_rn(magnitude, 0.5f, -2.0f));
  const float middle = __saturatef(__fmaf_rn(magnitude, 0.5f, -1.0f));
  const float lower = __saturatef(__fmul_rn(magnitude, 0.5f));
  const float sum = __fmaf_rn(middle, 2.0f, __fmaf_rn(lower, 4.0f, 0x1p23f));
  return __float_as_uint(__fadd_rn(upper, sum));
}

// Up to eight magnitudes (no NaN), with the signs of `signs` -> their codes in one word, the first in the lowest bits.
template <int kCount>
__device__ __forceinline__ uint32_t encode_e2m1_word(const float (&magnitudes)[kCount], const float (&signs)[kCount]) {
  static_assert(kCount <= 8, "eight codes fill a word");
  uint32_t word = 0, exponents = 0, sign[8] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    word += round_e2m1(magnitudes[i]) << 4 * i;
    exponents += 0x4B000000u << 4 * i;  // of 2^23
    sign[i] = __float_as_uint(signs[i]);
  }
  // The top bytes of the even and of the odd elements, which hold the signs in bit 7.
  const auto top = [](uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x0073); };
  const uint32_t even = __byte_perm(top(sign[0], sign[2]), top(sign[4], sign[6]), 0x5410);
  const uint32_t odd = __byte_perm(top(sign[1], sign[3]), top(sign[5], sign[7]), 0x5410);
  return word - exponents + ((even >> 4 & 0x08080808u) | (odd & 0x80808080u));
}

// 4-bit code -> fp32, exact. Exponent and mantissa in the place of those of fp32 are the value times 2^-126, whose
// subnormal stands for 0.5.
__device__ __forceinline__ float decode_e2m1(uint32_t code) {
  return __fmul_rn(__uint_as_float((code & 7u) << 22 | (code & 8u) << 28), 0x1p126f);
}

}  // namespace dsv4

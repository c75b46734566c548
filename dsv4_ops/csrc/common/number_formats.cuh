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
constexpr float kFp8AmaxFloor = 1e-4f;                      // smallest amax that an FP8 group is scaled for
constexpr float kMxfp4AmaxFloor = 6.0f * 0x1p-126f;         // smallest amax of an MXFP4 group
constexpr float kNvfp4ScaleFloor = 0x1p-126f;               // smallest global scale of NVFP4
constexpr float kNvfp4Largest = kE2m1Max * kE4m3Max;        // 2688: largest code times largest block scale

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

// 1 / decode_ue8m0(byte) for the bytes 1 .. 253 and 255 that a group's scale can have: exact, so that a product with it is
// the quotient that the reference computes.
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

// ---- E4M3 ----

// Two values -> two codes, nearest even, saturating at 448; `low` in bits 0..7.
__device__ __forceinline__ uint32_t encode_e4m3x2(float low, float high) { return ptx::cvt_e4m3x2(low, high); }

__device__ __forceinline__ uint32_t encode_e4m3(float value) { return encode_e4m3x2(value, 0.0f) & 0xFFu; }

__device__ __forceinline__ float2 decode_e4m3x2(uint32_t codes) {
  return __half22float2(ptx::cvt_half2(static_cast<uint16_t>(codes)));
}

__device__ __forceinline__ float decode_e4m3(uint32_t code) { return decode_e4m3x2(code & 0xFFu).x; }

// ---- E2M1 ----

// fp32 -> 4-bit code: nearest, ties to even code, saturating at 6; NaN gives 6; zero keeps its sign.
//
// Adding 2^(22 + e) to a magnitude below 2^(e + 1) rounds it to one mantissa bit, ties to even, in one rounding: the last
// bits of the sum are the magnitude in units of 2^(e - 1), which is the code less 2e. e is 0, 1 or 2.
__device__ __forceinline__ uint32_t encode_e2m1(float value) {
  const float magnitude = fminf(fabsf(value), kE2m1Max);  // fminf(NaN, 6) is 6
  const uint32_t binade = max(__float_as_uint(magnitude) & 0x7F800000u, 0x3F800000u);
  const float rounded = magnitude + __uint_as_float(binade + (22u << 23));
  const uint32_t code = (__float_as_uint(rounded) & 7u) + ((binade - 0x3F800000u) >> 22);
  const uint32_t sign = value == value ? (__float_as_uint(value) >> 28) & 8u : 0u;
  return code | sign;
}

// 4-bit code -> fp32, exact. The three bits of a magnitude are exponent and mantissa of a number whose subnormal is 0.5.
__device__ __forceinline__ float decode_e2m1(uint32_t code) {
  const uint32_t magnitude = code & 7u;
  const float normal = __uint_as_float((magnitude << 22) + (126u << 23));
  const float value = magnitude < 2 ? 0.5f * magnitude : normal;
  return __uint_as_float(__float_as_uint(value) | (code & 8u) << 28);
}

}  // namespace dsv4

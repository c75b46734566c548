// Quantising groups of values that lie in registers: the same for every kernel that ends in a quantiser.
//
// A group of kGroup neighbouring elements is spread over kGroup / kCount neighbouring lanes, kCount elements a lane. All
// lanes of the warp must call these functions together. What they compute is bit for bit what dsv4_ops/ops/quant.py and
// nvfp4.py define, NaN and infinity included.
#pragma once

#include <cstdint>

#include "common/number_formats.cuh"
#include "common/reduce.cuh"

namespace dsv4 {

// Largest magnitude of the group that this lane's values belong to; NaN if it holds one.
template <int kGroup, int kCount>
__device__ __forceinline__ float group_amax(const float (&values)[kCount]) {
  static_assert(kGroup % kCount == 0 && kGroup / kCount <= kWarp, "a group lies in one warp");
  uint32_t bits = magnitude_bits(values[0]);
#pragma unroll
  for (int i = 1; i < kCount; ++i) bits = max(bits, magnitude_bits(values[i]));
  return __uint_as_float(max_lanes<kGroup / kCount>(bits));
}

// values * factor as E4M3 codes.
template <int kCount>
__device__ __forceinline__ void encode_fp8(const float (&values)[kCount], float factor, uint8_t (&codes)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const uint32_t pair = encode_e4m3x2(values[i] * factor, values[i + 1] * factor);
    codes[i] = pair & 0xFF;
    codes[i + 1] = pair >> 8;
  }
}

// quant_fp8: codes, and the group's UE8M0 byte in every lane of the group.
template <int kGroup, int kCount>
__device__ __forceinline__ uint32_t quantise_fp8(const float (&values)[kCount], uint8_t (&codes)[kCount]) {
  const uint32_t scale = fp8_group_scale(group_amax<kGroup>(values));
  encode_fp8(values, invert_ue8m0(scale), codes);
  return scale;
}

// quant_fp8_fp32_scale: the scale is no power of two, so every value is divided.
template <int kGroup, int kCount>
__device__ __forceinline__ float quantise_fp8_fp32_scale(const float (&values)[kCount], uint8_t (&codes)[kCount]) {
  const float scale = clamp_min(group_amax<kGroup>(values), kFp8AmaxFloor) / kE4m3Max;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const uint32_t pair = encode_e4m3x2(values[i] / scale, values[i + 1] / scale);
    codes[i] = pair & 0xFF;
    codes[i + 1] = pair >> 8;
  }
  return scale;
}

// quant_mxfp4: packed codes, even element in the low nibble, and the group's UE8M0 byte.
template <int kCount>
__device__ __forceinline__ uint32_t quantise_mxfp4(const float (&values)[kCount], uint8_t (&packed)[kCount / 2]) {
  const uint32_t scale = mxfp4_group_scale(group_amax<32>(values));
  const float factor = invert_ue8m0(scale);
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    packed[i / 2] = encode_e2m1(values[i] * factor) | encode_e2m1(values[i + 1] * factor) << 4;
  }
  return scale;
}

// quant_nvfp4: packed codes and the group's E4M3 scale code, found with that rounded scale. A scale of 0 gives codes 0.
template <int kCount>
__device__ __forceinline__ uint32_t quantise_nvfp4(const float (&values)[kCount], float global_scale,
                                                   uint8_t (&packed)[kCount / 2]) {
  const uint32_t scale = encode_e4m3(group_amax<16>(values) / (kE2m1Max * global_scale));
  const float decoded = decode_e4m3(scale);
  const float step = decoded * global_scale;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const uint32_t pair = encode_e2m1(values[i] / step) | encode_e2m1(values[i + 1] / step) << 4;
    packed[i / 2] = decoded == 0.0f ? 0 : pair;
  }
  return scale;
}

}  // namespace dsv4

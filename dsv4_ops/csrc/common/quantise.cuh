// Quantising groups of values that lie in registers: the same for every kernel that ends in a quantiser.
//
// A group of kGroup neighbouring elements is spread over kGroup / kCount neighbouring lanes, kCount elements a lane.
// All lanes of the warp must call these functions together. What they compute is bit for bit what dsv4_ops/ops/quant.py
// and nvfp4.py define, NaN and infinity included.
#pragma once

#include <cstdint>

#include "common/number_formats.cuh"
#include "common/reduce.cuh"

namespace dsv4 {

// Largest magnitude of the group that this lane's values belong to; NaN if it holds one.
template <int kGroup, int kCount>
__device__ __forceinline__ float group_amax(const float (&values)[kCount]) {
  static_assert(kGroup % kCount == 0 && kGroup / kCount <= kWarp, "a group lies in one warp");
  float amax = fabsf(values[0]);
#pragma unroll
  for (int i = 1; i < kCount; ++i) amax = ptx::max_nan(amax, fabsf(values[i]));
  if constexpr (kGroup == kCount) return amax;
  return __uint_as_float(max_lanes<kGroup / kCount>(magnitude_bits(amax)));
}

// Quotients of many numbers by one, as good as IEEE division where the quotient is rounded to E4M3 or E2M1 next.
//
// high + low is 1 / divisor within 2^-46, so quotient() returns one of the two fp32 numbers next to x / divisor, and
// mostly the nearer one. It has to be that one, or on the same side, where x / divisor is nearly a tie between two
// codes, that is near an odd integer below 32 times a power of two. It is for every significand of the divisor but the
// largest, 2 - 2^-23 (then 2^k / divisor is taken for a tie), whichever approximation within 2 ulp rcp_approx_ftz
// returns: that was checked for all of them, and the GPU tests do it with the one that the hardware returns.
class Reciprocal {
 public:
  __device__ __forceinline__ explicit Reciprocal(float divisor) {
    const float first = ptx::rcp_approx_ftz(divisor);
    high_ = __fmaf_rn(__fmaf_rn(-divisor, first, 1.0f), first, first);
    low_ = __fmul_rn(__fmaf_rn(-divisor, high_, 1.0f), high_);
  }

  // |x / divisor|, for positive divisors from 2^-124 to 2^100 with a good significand and quotients below 2^100.
  __device__ __forceinline__ float quotient(float x) const {
    return __fmaf_rn(fabsf(x), high_, __fmul_rn(fabsf(x), low_));
  }

  static __device__ __forceinline__ bool good_significand(float divisor) {
    return (~__float_as_uint(divisor) & 0x7FFFFFu) != 0;
  }

 private:
  float high_, low_;
};

// x / divisor for all x and all divisors, also where a Reciprocal cannot be used. `inverse` is 1.0 / divisor. A
// quotient of fp32 numbers is never within 2^-49 of the middle of two, so that rounding the product, which is within
// 2^-52 of it, gives the quotient. (It may miss a tie of subnormal quotients, which are all rounded to zero next.)
__device__ __forceinline__ float exact_quotient(float x, double inverse) { return static_cast<float>(x * inverse); }

// values * factor as E4M3 codes.
template <int kCount>
__device__ __forceinline__ void encode_fp8(const float (&values)[kCount], float factor, uint8_t (&codes)[kCount]) {
  constexpr int kWord = kCount < 4 ? kCount : 4;  // codes of a register
  static_assert(kCount % kWord == 0, "whole registers");
#pragma unroll
  for (int first = 0; first < kCount; first += kWord) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kWord; i += 2) {
      word |= encode_e4m3x2(values[first + i] * factor, values[first + i + 1] * factor) << 8 * i;
    }
#pragma unroll
    for (int i = 0; i < kWord; ++i) codes[first + i] = word >> 8 * i & 0xFF;
  }
}

// Magnitudes (no NaN) with the signs of `signs` as packed E2M1 codes, the even element in the low nibble, of which the
// bits `keep` of every eight codes are kept and the bits `set` are set.
template <int kCount>
__device__ __forceinline__ void encode_fp4(const float (&magnitudes)[kCount], const float (&signs)[kCount],
                                           uint32_t keep, uint32_t set, uint8_t (&packed)[kCount / 2]) {
  constexpr int kWord = kCount < 8 ? kCount : 8;  // codes that are found together
  static_assert(kCount % kWord == 0, "whole words");
#pragma unroll
  for (int first = 0; first < kCount; first += kWord) {
    float magnitude[kWord], sign[kWord];
#pragma unroll
    for (int i = 0; i < kWord; ++i) {
      magnitude[i] = magnitudes[first + i];
      sign[i] = signs[first + i];
    }
    const uint32_t word = (encode_e2m1_word(magnitude, sign) & keep) | set;
#pragma unroll
    for (int i = 0; i < kWord / 2; ++i) packed[first / 2 + i] = word >> 8 * i & 0xFF;
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
  const float scale = __fdiv_rn(clamp_min(group_amax<kGroup>(values), kFp8AmaxFloor), kE4m3Max);
  float quotients[kCount];
  if (scale <= 0x1p100f && Reciprocal::good_significand(scale)) {
    const Reciprocal by_scale(scale);
#pragma unroll
    for (int i = 0; i < kCount; ++i) quotients[i] = copysignf(by_scale.quotient(values[i]), values[i]);
  } else {
    const double inverse = 1.0 / scale;
#pragma unroll
    for (int i = 0; i < kCount; ++i) quotients[i] = exact_quotient(values[i], inverse);
  }
  encode_fp8(quotients, 1.0f, codes);
  return scale;
}

// quant_mxfp4: packed codes, even element in the low nibble, and the group's UE8M0 byte. NaN in a group gives it the
// scale NaN and codes 6.
template <int kCount>
__device__ __forceinline__ uint32_t quantise_mxfp4(const float (&values)[kCount], uint8_t (&packed)[kCount / 2]) {
  const uint32_t scale = mxfp4_group_scale(group_amax<32>(values));
  const float factor = invert_ue8m0(scale);
  float magnitudes[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) magnitudes[i] = fabsf(values[i] * factor);
  const bool broken = scale == 255;
  encode_fp4(magnitudes, values, broken ? 0u : ~0u, broken ? 0x77777777u : 0u, packed);
  return scale;
}

// A global scale of NVFP4 and what its blocks share.
struct Nvfp4Global {
  float scale;
  float largest;  // code times scale, below a block scale of 1
  Reciprocal by_largest;

  __device__ __forceinline__ explicit Nvfp4Global(float global_scale)
      : scale(global_scale), largest(kE2m1Max * global_scale), by_largest(if_it_serves(largest)) {}

 private:
  // NaN, which makes all quotients NaN, unless quotients by `largest` and by the steps of its blocks are right.
  static __device__ __forceinline__ float if_it_serves(float largest) {
    const bool serves = largest >= 0x1p-112f && largest <= 0x1p90f && Reciprocal::good_significand(largest);
    return serves ? largest : __uint_as_float(0x7FFFFFFFu);
  }
};

// quant_nvfp4: packed codes and the group's E4M3 scale code, found with that rounded scale. A scale of 0 gives codes 0.
// amax: the largest magnitude of the group.
template <int kCount>
__device__ __forceinline__ uint32_t quantise_nvfp4(const float (&values)[kCount], float amax,
                                                   const Nvfp4Global& global, uint8_t (&packed)[kCount / 2]) {
  const float ratio = global.by_largest.quotient(amax);
  uint32_t scale = encode_e4m3(ratio);
  float step = decode_e4m3(scale) * global.scale;
  float magnitudes[kCount];
  // A ratio that overflows is NaN or an infinity of either sign.
  if (fabsf(ratio) <= 0x1p20f && Reciprocal::good_significand(step)) {
    const Reciprocal by_step(step);
#pragma unroll
    for (int i = 0; i < kCount; ++i) magnitudes[i] = by_step.quotient(values[i]);
    encode_fp4(magnitudes, values, scale == 0 ? 0u : ~0u, 0u, packed);
    return scale;
  }
  scale = encode_e4m3(__fdiv_rn(amax, global.largest));
  step = decode_e4m3(scale) * global.scale;
  const double inverse = 1.0 / step;
  float signs[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float quotient = exact_quotient(values[i], inverse);
    magnitudes[i] = fminf(fabsf(quotient), kE2m1Max);  // NaN gives 6, without a sign
    signs[i] = quotient == quotient ? quotient : 0.0f;
  }
  encode_fp4(magnitudes, signs, (scale & 0x7Fu) == 0 ? 0u : ~0u, 0u, packed);
  return scale;
}

template <int kCount>
__device__ __forceinline__ uint32_t quantise_nvfp4(const float (&values)[kCount], const Nvfp4Global& global,
                                                   uint8_t (&packed)[kCount / 2]) {
  return quantise_nvfp4(values, group_amax<16>(values), global, packed);
}

}  // namespace dsv4

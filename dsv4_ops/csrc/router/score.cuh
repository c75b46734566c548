// The score of an expert, sqrt(softplus(logit)), and its key.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"

namespace dsv4 {

constexpr float kSoftplusThreshold = 20.0f;  // of torch

__device__ __forceinline__ float score_of(float logit) {
  return __fsqrt_rn(logit > kSoftplusThreshold ? logit : log1pf(expf(logit)));
}

constexpr float kPlainLogit = 64.0f;

// Bit for bit the same for magnitudes up to kPlainLogit, in a third of the instructions: log1pf and the root without
// their branches for numbers that do not occur then.
__device__ __forceinline__ float score_of_plain(float logit) {
  const float x = expf(logit);
  // 1 + x = 2^e (1 + m) with m in [-1/4, 1/2): log(1 + x) = e log 2 + log(1 + m)
  const uint32_t exponent = (__float_as_uint(__fadd_rz(x, 1.0f)) - 0x3F400000u) & 0xFF800000u;
  const float scale = __uint_as_float(0x40800000u - exponent);  // 4 / 2^e
  const float m = __fmaf_rn(0.25f, scale, -1.0f) + __uint_as_float(__float_as_uint(x) - exponent);
  const float e = static_cast<float>(static_cast<int>(exponent));  // times 2^23
  float p = __fmaf_rn(__uint_as_float(0xBD39BF78u), m, __uint_as_float(0x3DD80012u));
  p = __fmaf_rn(p, m, __uint_as_float(0xBE0778E0u));
  p = __fmaf_rn(p, m, __uint_as_float(0x3E146475u));
  p = __fmaf_rn(p, m, __uint_as_float(0xBE2A68DDu));
  p = __fmaf_rn(p, m, __uint_as_float(0x3E4CAF9Eu));
  p = __fmaf_rn(p, m, __uint_as_float(0xBE800042u));
  p = __fmaf_rn(p, m, __uint_as_float(0x3EAAAAE6u));
  p = __fmaf_rn(p, m, -0.5f);
  const float log1p = __fmaf_rn(e, 0x1p-23f * 0.693147182f, __fmaf_rn(m * p, m, m));
  const float softplus = logit > kSoftplusThreshold ? logit : log1p;
  // Newton's step from the approximate root gives the nearest number.
  const float inverse = ptx::rsqrt_approx_ftz(softplus), root = softplus * inverse;
  return __fmaf_rn(__fmaf_rn(-root, root, softplus), 0.5f * inverse, root);
}

// ordered() of a number other than -0, which is no sum of a positive score and a bias.
__device__ __forceinline__ uint32_t ordered_number(float value) {
  const int32_t bits = __float_as_int(value);
  return static_cast<uint32_t>(bits ^ (bits >> 31 | INT32_MIN));
}

}  // namespace dsv4

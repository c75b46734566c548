// RMS norm of rows in registers: the arithmetic of rms_norm in dsv4_ops/ops/norm.py, as torch does it on a CPU.
//
//   y = weight * (x * (1 / sqrt(sum(x^2) / width + eps))), every step rounded to fp32, y rounded to the dtype of x
//
// Only the order of the sum is ours. Whoever calls these functions adds the sums of its vectors in an order that
// depends on the width alone.
#pragma once

#include "common/vector.cuh"

namespace dsv4 {

// Sum of the squares of neighbouring values, in two interleaved chains.
template <int kCount>
__device__ __forceinline__ float sum_of_squares(const float (&values)[kCount]) {
  static_assert(kCount % 2 == 0, "two chains");
  float even = 0.0f, odd = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    even = __fmaf_rn(values[i], values[i], even);
    odd = __fmaf_rn(values[i + 1], values[i + 1], odd);
  }
  return even + odd;
}

// 1 / rms of a row of `width` values whose squares add up to `sum`.
__device__ __forceinline__ float inverse_rms(float sum, int width, float eps) {
  return __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(sum, static_cast<float>(width)), eps)));
}

// y as it is stored in T.
template <typename T>
__device__ __forceinline__ float rms_norm(float value, float weight, float inverse_rms) {
  return round_to<T>(__fmul_rn(weight, __fmul_rn(value, inverse_rms)));
}

// Neighbouring values -> what y is before it is rounded to T, in place.
template <int kCount>
__device__ __forceinline__ void scale_by_rms(float (&values)[kCount], const float (&weights)[kCount],
                                             float inverse_rms) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = __fmul_rn(weights[i], __fmul_rn(values[i], inverse_rms));
}

// Neighbouring values -> y as it is stored in T, in place.
template <typename T, int kCount>
__device__ __forceinline__ void rms_norm(float (&values)[kCount], const float (&weights)[kCount], float inverse_rms) {
  scale_by_rms(values, weights, inverse_rms);
  round_all_to<T>(values);
}

}  // namespace dsv4

// Walsh-Hadamard transform over the lanes of a warp, bit for bit `hadamard` of dsv4_ops/ops/formats.py: fp32
// butterflies of width 1, 2, 4, ..., then one product with size^-0.5.
#pragma once

#include "common/reduce.cuh"

namespace dsv4 {

// size^-0.5 for a power of two, rounded once.
__host__ __device__ constexpr float inverse_root(int size) {
  float root = 1.0f;
  for (; size >= 4; size /= 4) root *= 0.5f;
  return size == 2 ? root * 0.70710678118654752f : root;
}

// Transform kSize values that are spread over kSize / kCount neighbouring lanes, kCount neighbouring values a lane. All
// lanes of the warp must call it together.
template <int kSize, int kCount>
__device__ __forceinline__ void hadamard(float (&values)[kCount]) {
  constexpr int kLanes = kSize / kCount;
  constexpr float kScale = inverse_root(kSize);
  static_assert((kSize & (kSize - 1)) == 0 && kSize % kCount == 0 && kLanes <= kWarp, "a power of two in one warp");
#pragma unroll
  for (int width = 1; width < kCount; width *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i & width) continue;
      const float low = values[i], high = values[i + width];
      values[i] = __fadd_rn(low, high);
      values[i + width] = __fsub_rn(low, high);
    }
  }
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    // low + high in the lower lane, low - high in the upper one; the product with +-1 is exact.
    const float sign = threadIdx.x & distance ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = __fmaf_rn(sign, values[i], __shfl_xor_sync(kAllLanes, values[i], distance));
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = __fmul_rn(values[i], kScale);
}

}  // namespace dsv4

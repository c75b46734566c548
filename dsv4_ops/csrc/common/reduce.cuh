// Sums and maxima over lanes and CTAs in a fixed order: the same inputs give the same bits.
//
// A maximum of magnitudes is taken on their bits as integers. That is exact, and a NaN wins against everything, as it
// does in torch; fmaxf would drop it.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"

namespace dsv4 {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Sum over groups of kLanes neighbouring lanes; every lane gets the result of its group.
template <int kLanes = kWarp>
__device__ __forceinline__ float sum_lanes(float value) {
  static_assert(kLanes <= kWarp && (kLanes & (kLanes - 1)) == 0, "a power of two of lanes");
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// Bits of |value|, ordered as unsigned integers: NaN above infinity above every number.
__device__ __forceinline__ uint32_t magnitude_bits(float value) { return __float_as_uint(value) & 0x7FFFFFFFu; }

// Largest magnitude of neighbouring values, as such bits.
template <int kCount>
__device__ __forceinline__ uint32_t max_magnitude_bits(const float (&values)[kCount]) {
  float largest = fabsf(values[0]);
#pragma unroll
  for (int i = 1; i < kCount; ++i) largest = ptx::max_nan(largest, fabsf(values[i]));
  return magnitude_bits(largest);
}

// Largest of `bits` over groups of kLanes neighbouring lanes.
template <int kLanes = kWarp>
__device__ __forceinline__ uint32_t max_lanes(uint32_t bits) {
  if constexpr (kLanes == kWarp) {
    return __reduce_max_sync(kAllLanes, bits);
  } else {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      bits = max(bits, __shfl_xor_sync(kAllLanes, bits, distance));
    }
    return bits;
  }
}

// Sum over a CTA of kWarps whole warps; every thread gets the result. `scratch` holds kWarps floats and may be used
// again after the next barrier.
template <int kWarps>
__device__ __forceinline__ float sum_cta(float value, float* scratch) {
  value = sum_lanes(value);
  if constexpr (kWarps == 1) return value;
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) total += scratch[warp];
  return total;
}

// Largest of `bits` over a CTA of kWarps whole warps, as sum_cta.
template <int kWarps>
__device__ __forceinline__ uint32_t max_cta(uint32_t bits, uint32_t* scratch) {
  bits = max_lanes(bits);
  if constexpr (kWarps == 1) return bits;
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = bits;
  __syncthreads();
  uint32_t largest = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) largest = max(largest, scratch[warp]);
  return largest;
}

// Sum over a CTA of blockDim.x / 32 whole warps, for kernels that choose their threads by the width of a row; every
// thread gets the result. A thread has kParts values and adds them like as many threads, blockDim.x apart, with one
// each, so that fewer threads may do the work of many: the same values give the same bits. Threads times parts are at
// most 32 kMaxWarps. `scratch` holds kMaxWarps floats at a multiple of 16 bytes; it is free after the next barrier.
template <int kMaxWarps, int kParts>
__device__ __forceinline__ float sum_warps(const float (&values)[kParts], float* scratch) {
  static_assert(kMaxWarps % 4 == 0 && kMaxWarps <= kWarp, "a lane adds four");
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const float sum = sum_lanes(values[part]);
    if (lane == 0) scratch[part * warps + warp] = sum;
  }
  if (warp == 0 && lane >= kParts * warps && lane < kMaxWarps) scratch[lane] = 0.0f;
  __syncthreads();
  const float4 four = reinterpret_cast<const float4*>(scratch)[lane % (kMaxWarps / 4)];
  return sum_lanes<kMaxWarps / 4>((four.x + four.y) + (four.z + four.w));
}

template <int kMaxWarps>
__device__ __forceinline__ float sum_warps(float value, float* scratch) {
  const float values[1] = {value};
  return sum_warps<kMaxWarps>(values, scratch);
}

// Largest of `bits` over such a CTA; `scratch` holds a word for each warp.
__device__ __forceinline__ uint32_t max_warps(uint32_t bits, uint32_t* scratch) {
  bits = max_lanes(bits);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  if (lane == 0) scratch[warp] = bits;
  __syncthreads();
  return max_lanes(lane < warps ? scratch[lane] : 0u);
}

}  // namespace dsv4

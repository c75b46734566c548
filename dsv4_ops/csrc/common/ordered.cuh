// fp32 values as integers in the order in which torch sorts them.
#pragma once

#include <cstdint>

namespace dsv4 {

// Unsigned integer in the order of the values: -0 equals 0, NaN of either sign lies above infinity. 0 is below every
// value.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 + 0 is 0
  if (value != value) return 0xFFFFFFFFu;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The value; NaN for 0xFFFFFFFF and for 0.
__device__ __forceinline__ float from_ordered(uint32_t key) {
  return __uint_as_float(key ^ (0x80000000u | ~static_cast<uint32_t>(static_cast<int32_t>(key) >> 31)));
}

}  // namespace dsv4

// Division by a number that is known at the launch.
#pragma once

#include <cstdint>

namespace dsv4 {

// Quotients of numbers >= 0 in three instructions instead of thirty: n / d is (n + n * m / 2^32) / 2^s for
// s = ceil(log2 d), m = floor(2^32 (2^s - d) / d) + 1 and n below 2^31.
struct Divisor {
  int shift;
  uint32_t multiplier;

  explicit Divisor(int divisor) : shift(0) {
    while (int64_t{1} << shift < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((int64_t{1} << shift) - divisor) * (int64_t{1} << 32) / divisor + 1);
  }

  __device__ __forceinline__ int divide(int n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

}  // namespace dsv4

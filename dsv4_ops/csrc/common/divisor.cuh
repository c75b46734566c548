// Division by a number that is known at the launch.
#pragma once

#include <cstdint>

namespace dsv4 {

// Quotients of numbers below 2^31 by one that the host knows: a product and a shift.
//
// With divisor <= 2^s and m = ceil(2^(31 + s) / divisor), n * m / 2^(31 + s) exceeds n / divisor by less than
// n / 2^31 / divisor: too little to reach the next integer.
class Divisor {
 public:
  explicit Divisor(uint32_t divisor) : divisor_(divisor), shift_(0) {
    while ((1ull << shift_) < divisor) ++shift_;
    multiplier_ = divisor == 0 ? 0 : static_cast<uint32_t>(((1ull << (31 + shift_)) + divisor - 1) / divisor);
  }

  __device__ __forceinline__ uint32_t quotient(uint32_t n) const { return __umulhi(2 * n, multiplier_) >> shift_; }

  // The same for an int that is not negative.
  __device__ __forceinline__ int divide(int n) const { return static_cast<int>(quotient(static_cast<uint32_t>(n))); }

  __device__ __forceinline__ uint32_t value() const { return divisor_; }

 private:
  uint32_t divisor_, multiplier_, shift_;
};

}  // namespace dsv4

// Rows cut into vectors of neighbouring elements that are numbered through all rows, for kernels in which a thread
// takes the next vector wherever it lies.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace dsv4 {

// CTAs, or others, that it takes for all.
__host__ __device__ constexpr uint32_t ceil_div(uint32_t all, uint32_t each) { return all / each + (all % each != 0); }

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

  __device__ __forceinline__ uint32_t value() const { return divisor_; }

 private:
  uint32_t divisor_, multiplier_, shift_;
};

// The vectors of rows of T: place() tells where number `index` lies, at() its address.
template <typename T, int kCount>
class RowVectors {
 public:
  static constexpr int64_t kMost = INT32_MAX;  // vectors

  // kCount divides the width of the rows.
  RowVectors(const void* data, Rows rows)
      : data_(static_cast<const char*>(data)),
        row_bytes_(rows.stride * static_cast<int64_t>(sizeof(T))),
        count_(static_cast<uint32_t>(rows.count * (rows.width / kCount))),
        of_row_(static_cast<uint32_t>(rows.width / kCount)) {}

  struct Place {
    uint32_t row;
    uint32_t vector;  // of the row
  };

  __host__ __device__ uint32_t count() const { return count_; }

  __device__ __forceinline__ uint32_t of_row() const { return of_row_.value(); }

  __device__ __forceinline__ Place place(uint32_t index) const {
    const uint32_t row = of_row_.quotient(index);
    return {row, index - row * of_row_.value()};
  }

  __device__ __forceinline__ const T* at(Place place) const {
    constexpr uint32_t kBytes = sizeof(T) * kCount;
    return reinterpret_cast<const T*>(data_ + place.row * row_bytes_ + static_cast<uint64_t>(place.vector) * kBytes);
  }

 private:
  const char* data_;
  int64_t row_bytes_;  // from one row to the next
  uint32_t count_;
  Divisor of_row_;
};

}  // namespace dsv4

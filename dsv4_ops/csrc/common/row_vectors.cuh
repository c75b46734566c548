// Rows cut into vectors of neighbouring elements that are numbered through all rows, for kernels in which a thread
// takes the next vector wherever it lies.
#pragma once

#include <cstdint>

#include "common/divisor.cuh"
#include "common/types.h"

namespace dsv4 {

// CTAs, or others, that it takes for all.
__host__ __device__ constexpr uint32_t ceil_div(uint32_t all, uint32_t each) { return all / each + (all % each != 0); }

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

// The global scale of NVFP4 rows: [1], one for the tensor, or [..., 1], one for each row.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace dsv4 {

class GlobalScale {
 public:
  GlobalScale(const float* values, Rows rows)
      : values_(reinterpret_cast<const char*>(values)),
        row_bytes_(rows.count == 1 ? 0 : rows.stride * static_cast<int64_t>(sizeof(float))) {}

  __device__ __forceinline__ bool differs() const { return row_bytes_ != 0; }  // from row to row

  __device__ __forceinline__ float of(uint32_t row) const {
    return *reinterpret_cast<const float*>(values_ + row * row_bytes_);
  }

 private:
  const char* values_;
  int64_t row_bytes_;  // 0: one for all
};

}  // namespace dsv4

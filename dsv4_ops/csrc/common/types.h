// What launchers and bind.cpp tell each other. No torch header, no CUDA device code.
#pragma once

#include <cstdint>

namespace dsv4 {

enum class Dtype { kBf16, kFp32 };

// Rows of a tensor [..., width]: `count` rows of `width` elements, `stride` elements from one to the next.
struct Rows {
  int64_t count;
  int64_t width;
  int64_t stride;
};

}  // namespace dsv4

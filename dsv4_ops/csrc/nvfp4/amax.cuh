// Largest magnitude of neighbouring elements, by all threads of a warp or CTA.
#pragma once

#include <cstdint>

#include "common/number_formats.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace dsv4 {

constexpr int kAmaxLoads = 4;  // of a thread, in flight

// Elements that kThreads threads look at before they come back for more.
template <int kThreads, typename T>
constexpr int64_t kAmaxSpan = kThreads * kAmaxLoads * static_cast<int64_t>(16 / sizeof(T));

// What one of kThreads threads finds among `count` elements. kAligned: they start at a multiple of 16 bytes and come in
// whole vectors of 16 bytes; else a thread loads them one by one.
template <int kThreads, bool kAligned, typename T>
__device__ __forceinline__ float thread_amax(const T* values, int64_t count, int thread) {
  constexpr int kCount = kAligned ? 16 / sizeof(T) : 1;
  float amax = 0.0f;
  for (int64_t start = thread * kCount; start < count; start += kThreads * kCount * kAmaxLoads) {
    float loaded[kAmaxLoads][kCount] = {};
#pragma unroll
    for (int i = 0; i < kAmaxLoads; ++i) {
      const int64_t first = start + i * (kThreads * kCount);
      if (first < count) load_floats(values + first, loaded[i]);
    }
#pragma unroll
    for (int i = 0; i < kAmaxLoads; ++i) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) amax = ptx::max_nan(amax, fabsf(loaded[i][j]));
    }
  }
  return amax;
}

// Whether rows of T can be read in vectors of 16 bytes.
template <typename T>
bool has_vectors(const void* data, Rows rows) {
  const int64_t bytes = sizeof(T);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && rows.width * bytes % 16 == 0 && rows.stride * bytes % 16 == 0;
}

}  // namespace dsv4

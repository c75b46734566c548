// A row of an RMS norm in the registers of a CTA: what rms_norm and rms_norm_quant_* share.
//
// A thread owns 2 vectors of 8 elements (4 above a width of 7168), blockDim.x vectors apart, and keeps them packed in
// registers from the only read of x to the only write of y; the number of threads follows from the width, 448 for 7168.
// With many rows half the threads do the work of all, each two parts of it: fewer instructions a row, which then cost
// as much as the memory, and more rows in flight. The order of the sum of squares is that of all threads.
//
// Rows that are not whole vectors, that start anywhere or that are wider than 16384 are read element by element, and
// again in every phase, by norm_any_row: the same owners, hence the same sums.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/rms_norm.cuh"
#include "common/vector.cuh"

namespace dsv4 {

constexpr int kNormCount = 8;        // elements of a vector
constexpr int kNormMaxWarps = 16;    // of a CTA
constexpr int kNormManyRows = 264;   // two CTAs for each SM: from here on half the threads

// Most threads of a CTA: 448 with 2 vectors hold a row of 7168, 512 with 4 one of 16384.
constexpr int norm_max_threads(int vectors) { return vectors == 2 ? 448 : kNormMaxWarps * kWarp; }

// CTAs that must fit on an SM where many rows of bf16 are normed, so that some load while others compute.
template <int kParts, typename T, typename W>
constexpr int norm_min_ctas(int wanted) {
  return kParts == 2 && sizeof(T) + sizeof(W) == 4 ? wanted : 1;
}

template <int kVectors, int kParts, typename T, typename W>
struct NormRow {
  static constexpr int kAll = kVectors * kParts;  // vectors of a thread: vector i belongs to part i % kParts
  Packed<W, kNormCount> weights[kAll];
  Packed<T, kNormCount> values[kAll];
  unsigned width;

  __device__ __forceinline__ static unsigned column_of(int i) { return (threadIdx.x + i * blockDim.x) * kNormCount; }

  __device__ __forceinline__ bool inside(int i) const { return column_of(i) < width; }

  // Threads past the end of the row work on its last vector, and neither add it nor write it.
  __device__ __forceinline__ unsigned source_of(int i) const { return min(column_of(i), width - kNormCount); }

  __device__ __forceinline__ void load_weights(const W* weight) {
#pragma unroll
    for (int i = 0; i < kAll; ++i) weights[i].load(weight + source_of(i));
  }

  __device__ __forceinline__ void load(const T* x) {
#pragma unroll
    for (int i = 0; i < kAll; ++i) values[i].load_once(x + source_of(i));
  }

  // x -> y in place. One barrier; `scratch` holds kNormMaxWarps floats at a multiple of 16 bytes.
  __device__ __forceinline__ void normalise(float eps, float* scratch) {
    float squares[kParts] = {};
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
      float x[kNormCount];
      values[i].to_floats(x);
      const float sum = sum_of_squares(x);
      squares[i % kParts] += inside(i) ? sum : 0.0f;
    }
    const float scale = inverse_rms(sum_warps<kNormMaxWarps>(squares, scratch), width, eps);
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
      float y[kNormCount], factors[kNormCount];
      values[i].to_floats(y);
      weights[i].to_floats(factors);
      scale_by_rms(y, factors, scale);
      values[i].round(y);
    }
  }
};

// function(column) for the vectors of a row that a thread owns: whole warps, also the lanes past the end of the row.
template <typename Function>
__device__ __forceinline__ void for_each_norm_vector(unsigned width, Function function) {
  const unsigned step = blockDim.x * kNormCount;
  for (unsigned first = 0; first < width; first += step) function(first + threadIdx.x * kNormCount);
}

// x [width] -> y [width], of any width and anywhere. Returns the bits of the largest magnitude that this thread wrote.
template <typename T, typename W>
__device__ __forceinline__ uint32_t norm_any_row(const T* x, const W* weight, unsigned width, float eps, T* y,
                                                 float* scratch) {
  float values[kNormCount], factors[kNormCount];
  float sum = 0.0f;
  for_each_norm_vector(width, [&](unsigned column) {
    load_some(x + column, static_cast<int>(width - column), values);
    sum += sum_of_squares(values);
  });
  const float scale = inverse_rms(sum_warps<kNormMaxWarps>(sum, scratch), width, eps);
  uint32_t bits = 0;
  for_each_norm_vector(width, [&](unsigned column) {
    const int left = static_cast<int>(width - column);
    load_some(x + column, left, values);
    load_some(weight + column, left, factors);
    rms_norm<T>(values, factors, scale);
    store_some(y + column, left, values);
    if (left > 0) bits = max(bits, max_magnitude_bits(values));
  });
  return bits;
}

// How the rows of a launch are divided.
struct NormTactic {
  bool in_registers;
  int vectors, parts;  // of a thread
  int warps;           // of a CTA
};

inline NormTactic norm_tactic(Rows rows, size_t element, std::initializer_list<const void*> addresses) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t count = ceil_div(rows.width, kNormCount);
  const int vectors = count <= 2 * norm_max_threads(2) ? 2 : 4;
  const int warps = static_cast<int>(std::min<int64_t>(ceil_div(count, vectors * kWarp), kNormMaxWarps));
  const bool aligned = std::all_of(addresses.begin(), addresses.end(), [](const void* address) {
    return reinterpret_cast<uintptr_t>(address) % 16 == 0;
  });
  const bool in_registers = aligned && rows.width % kNormCount == 0 && rows.stride * element % 16 == 0 &&
                            count <= vectors * norm_max_threads(vectors);
  const bool halved = in_registers && vectors == 2 && warps % 2 == 0 && rows.count >= kNormManyRows;
  return {in_registers, vectors, halved ? 2 : 1, halved ? warps / 2 : warps};
}

// function(kVectors, kParts) as constants.
template <typename Function>
cudaError_t with_norm_tactic(const NormTactic& tactic, Function function) {
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  if (tactic.vectors == 4) return function(std::integral_constant<int, 4>{}, One{});
  return tactic.parts == 2 ? function(Two{}, Two{}) : function(Two{}, One{});
}

}  // namespace dsv4

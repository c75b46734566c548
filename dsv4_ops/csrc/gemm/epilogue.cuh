// What happens to an fp32 sum: ranges of k are added as a tree, global scales applied, and the result is rounded once.
#pragma once

#include <cuda_bf16.h>

#include "common/weight_fragments.cuh"
#include "gemm/plan.h"

namespace dsv4 {

// Let `kernel` run with the largest shared memory that an SM can have. An SM changes the division of its memory only
// when it is idle: kernels with the same division can lie on it side by side, the next one reading ahead.
inline cudaError_t take_all_shared_memory(const void* kernel) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

// Sum of the ranges of k (as many as there are, then zeros): neighbours first.
__device__ __forceinline__ float sum_of_ranges(float (&values)[kMostRanges]) {
#pragma unroll
  for (int step = 1; step < kMostRanges; step *= 2) {
#pragma unroll
    for (int i = 0; i < kMostRanges; i += 2 * step) values[i] = __fadd_rn(values[i], values[i + step]);
  }
  return values[0];
}

// The same of `ranges` (2, 4 or 8) numbers that lie `distance` apart.
__device__ __forceinline__ float add_ranges(int ranges, const float* sums, int64_t distance) {
  float values[kMostRanges];
#pragma unroll
  for (int i = 0; i < kMostRanges; ++i) values[i] = i < ranges ? sums[i * distance] : 0.0f;
  return sum_of_ranges(values);
}

// y[at] = sum, rounded to the dtype of y.
__device__ __forceinline__ void store_rounded(const Product& p, int64_t at, float sum) {
  if (p.y_dtype == Dtype::kBf16) {
    static_cast<__nv_bfloat16*>(p.y)[at] = __float2bfloat16_rn(sum);
  } else {
    static_cast<float*>(p.y)[at] = sum;
  }
}

// Sum of the products of the fragments -> product of row `x_row` of x.
template <Format kFormat>
__device__ __forceinline__ float finish_product(const Product& p, int64_t x_row, float sum) {
  if constexpr (kFormat == Format::kMxfp4) sum = __fmul_rn(sum, kE2m1HalvesUnit);
  if constexpr (kFormat == Format::kNvfp4) {
    const float global = __fmul_rn(p.x_global[x_row * p.x_global_stride], *p.weight_global);
    sum = __fmul_rn(__fmul_rn(sum, kE2m1HalvesUnit * kE2m1HalvesUnit), global);
  }
  return sum;
}

// The same -> y of that row of x and row `row` of the weight in its group.
template <Format kFormat>
__device__ __forceinline__ void store_product(const Product& p, int64_t x_row, int64_t row, float sum) {
  store_rounded(p, x_row * p.rows + row, finish_product<kFormat>(p, x_row, sum));
}

}  // namespace dsv4

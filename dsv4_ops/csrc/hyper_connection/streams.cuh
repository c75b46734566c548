// What the kernels of this family share: columns of streams in registers, and hc_post of one column.
#pragma once

#include "common/vector.cuh"
#include "hyper_connection/hyper_connection.h"

namespace dsv4 {

constexpr int kCount = 8;  // neighbouring columns of a thread

template <typename T>
using Columns = Packed<T, kCount>;

// Values rounded to T, as they lie in memory.
template <typename T>
__device__ __forceinline__ Columns<T> to_columns(const float (&values)[kCount]) {
  Columns<T> columns;
  store_floats(reinterpret_cast<T*>(columns.parts), values);
  return columns;
}

// sum + weight * x as torch rounds it: the product, then the sum.
__device__ __forceinline__ float add_weighted(float sum, float weight, float x) {
  return __fadd_rn(sum, __fmul_rn(weight, x));
}

// First term of a weighted sum. torch adds it to 0, which makes 0 of -0; so does this, in one instruction.
__device__ __forceinline__ float first_weighted(float weight, float x) { return __fmaf_rn(weight, x, 0.0f); }

// One column of a new stream: post * f + (((comb_0 x_0 + comb_1 x_1) + comb_2 x_2) + comb_3 x_3).
__device__ __forceinline__ float post_column(float post, float f, const float (&comb)[4], const float (&x)[4]) {
  float mixed = first_weighted(comb[0], x[0]);
#pragma unroll
  for (int j = 1; j < 4; ++j) mixed = add_weighted(mixed, comb[j], x[j]);
  return __fadd_rn(__fmul_rn(post, f), mixed);
}

}  // namespace dsv4

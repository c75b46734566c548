// Sinkhorn-Knopp in registers: softmax of the rows plus eps, a column normalisation, then iterations - 1 times rows and
// columns, where a normalisation divides by the sum plus eps.
//
// The matrix itself is never divided. With A = softmax + eps, every iterate is A_jk / (p_j q_k), and dividing its rows
// by their sums plus eps is
//
//   p_j <- sum_k A_jk / q_k + eps p_j,    and for the columns    q_k <- sum_j A_jk / p_j + eps q_k
//
// which is the definition, eps included: 20 multiply-adds and 4 reciprocals a step instead of 16 quotients for n = 4. A
// reciprocal is within one ulp (rcp.approx), like the quotients of the definition. Each of the 2 * iterations - 1 steps
// waits for the one before, so the time is that of a reciprocal and a few multiply-adds as many times.
#pragma once

#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "hyper_connection/hyper_connection.h"

namespace dsv4 {

// A 4 x 4 matrix of logits by one thread; `matrix` becomes the result.
__device__ __forceinline__ void sinkhorn_4(float (&matrix)[4][4], float eps, int iterations) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float largest = fmaxf(fmaxf(matrix[j][0], matrix[j][1]), fmaxf(matrix[j][2], matrix[j][3]));
#pragma unroll
    for (int k = 0; k < 4; ++k) matrix[j][k] = expf(matrix[j][k] - largest);
    const float scale = 1.0f / ((matrix[j][0] + matrix[j][1]) + (matrix[j][2] + matrix[j][3]));
#pragma unroll
    for (int k = 0; k < 4; ++k) matrix[j][k] = __fadd_rn(__fmul_rn(matrix[j][k], scale), eps);
  }
  float p[4], q[4], u[4], v[4];  // u = 1 / p, v = 1 / q
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    p[k] = u[k] = 1.0f;
    q[k] = ((matrix[0][k] + matrix[1][k]) + (matrix[2][k] + matrix[3][k])) + eps;
    v[k] = ptx::rcp_approx_ftz(q[k]);
  }
#pragma unroll 1
  for (int iteration = 1; iteration < iterations; ++iteration) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      p[j] *= eps;
#pragma unroll
      for (int k = 0; k < 4; ++k) p[j] = __fmaf_rn(matrix[j][k], v[k], p[j]);
      u[j] = ptx::rcp_approx_ftz(p[j]);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      q[k] *= eps;
#pragma unroll
      for (int j = 0; j < 4; ++j) q[k] = __fmaf_rn(matrix[j][k], u[j], q[k]);
      v[k] = ptx::rcp_approx_ftz(q[k]);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) matrix[j][k] *= u[j] * v[k];
  }
}

// An n x n matrix by a warp, n <= 16: lane j < n holds row j of the logits, which becomes row j of the result.
// `scratch` holds n * n floats.
__device__ __forceinline__ void sinkhorn_warp(float (&row)[kMaxStreams], int n, float eps, int iterations,
                                              float* scratch) {
  const int lane = threadIdx.x % kWarp;
  const bool inside = lane < n;
  float largest = row[0];
#pragma unroll
  for (int k = 1; k < kMaxStreams; ++k) largest = k < n ? fmaxf(largest, row[k]) : largest;
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kMaxStreams; ++k) {
    row[k] = k < n ? expf(row[k] - largest) : 0.0f;
    sum += row[k];
  }
  float column[kMaxStreams];
  float p = 1.0f, q = eps;  // of row and column `lane`
#pragma unroll
  for (int k = 0; k < kMaxStreams; ++k) {
    row[k] = inside && k < n ? __fadd_rn(row[k] / sum, eps) : 0.0f;
    if (inside && k < n) scratch[lane * n + k] = row[k];
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kMaxStreams; ++j) {
    column[j] = inside && j < n ? scratch[j * n + lane] : 0.0f;
    q += column[j];
  }
  float u = 1.0f, v = inside ? ptx::rcp_approx_ftz(q) : 0.0f;  // 1 / p, 1 / q
#pragma unroll 1
  for (int iteration = 1; iteration < iterations; ++iteration) {
    p *= eps;
#pragma unroll
    for (int k = 0; k < kMaxStreams; ++k) p = __fmaf_rn(row[k], __shfl_sync(kAllLanes, v, k), p);
    u = inside ? ptx::rcp_approx_ftz(p) : 0.0f;
    q *= eps;
#pragma unroll
    for (int j = 0; j < kMaxStreams; ++j) q = __fmaf_rn(column[j], __shfl_sync(kAllLanes, u, j), q);
    v = inside ? ptx::rcp_approx_ftz(q) : 0.0f;
  }
#pragma unroll
  for (int k = 0; k < kMaxStreams; ++k) row[k] *= u * __shfl_sync(kAllLanes, v, k);
}

}  // namespace dsv4

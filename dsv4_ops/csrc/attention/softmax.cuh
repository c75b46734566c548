// Softmax over units of keys whose results are added up in order, and what becomes of the sum.
//
// A warpgroup holds scores, weights and output with heads as columns (the layout of ptx::wgmma): a thread has kHeads / 4
// columns, 8 * j + 2 * (lane % 4) + i, and of each the same rows. Scores are in units of log 2: score * log2(e) / sqrt(D).
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace dsv4 {

constexpr int kWarpgroup = 128;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

template <int kHeads>
constexpr int kColumns = kHeads / 4;  // of a thread

// The head of a thread's column.
__device__ __forceinline__ int head_of_column(int column, int lane) { return column / 2 * 8 + lane % 4 * 2 + column % 2; }

struct Larger {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
  __device__ float operator()(float a, float b) const { return __fadd_rn(a, b); }
};

// Combine each column over the 8 lanes that hold it, and store the warp's results [kHeads]. Lanes halve the columns that
// they go on with as long as they have more than one; the order of a sum does not depend on kHeads.
template <int kHeads, typename Operation>
__device__ __forceinline__ void reduce_columns(float (&values)[kColumns<kHeads>], float* results, Operation operation) {
  const int lane = threadIdx.x % kWarp;
  int column = 0, left = kColumns<kHeads>;
  bool writes = true;
#pragma unroll
  for (int distance = 16; distance >= 4; distance /= 2) {
    const bool upper = lane & distance;
    if (left > 1) {
      left /= 2;
#pragma unroll
      for (int i = 0; i < left; ++i) {
        const float kept = upper ? values[left + i] : values[i], sent = upper ? values[i] : values[left + i];
        values[i] = operation(kept, __shfl_xor_sync(kAllLanes, sent, distance));
      }
      column += upper ? left : 0;
    } else {
      values[0] = operation(values[0], __shfl_xor_sync(kAllLanes, values[0], distance));
      writes = writes && !upper;
    }
  }
  if (writes) results[head_of_column(column, lane)] = values[0];
}

// A thread's columns of the results of the four warps, combined in order.
template <int kHeads, typename Operation>
__device__ __forceinline__ void combine_warps(const float* results, float (&values)[kColumns<kHeads>],
                                              Operation operation) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int column = 0; column < kColumns<kHeads>; column += 2) {
    const auto* const from = reinterpret_cast<const float2*>(results + head_of_column(column, lane));
    constexpr int kStride = kHeads / 2;
    const float2 a = from[0], b = from[kStride], c = from[2 * kStride], d = from[3 * kStride];
    values[column] = operation(operation(a.x, b.x), operation(c.x, d.x));
    values[column + 1] = operation(operation(a.y, b.y), operation(c.y, d.y));
  }
}

// What the units so far amount to, for each of a thread's columns. Weights are relative to the score `reference`, the
// largest of some unit. It is only raised when a unit exceeds it by more than kSlack, so that output sums are rarely
// rescaled; weights below 2^kSlack do no harm. All that depends on the row's own scores alone.
template <int kHeads>
struct Totals {
  float reference[kColumns<kHeads>], sum[kColumns<kHeads>];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int column = 0; column < kColumns<kHeads>; ++column) {
      reference[column] = -INFINITY;
      sum[column] = 0.0f;
    }
  }
};

constexpr float kSlack = 8.0f;

// What a unit and what came before it are multiplied by when they are added.
template <int kHeads>
struct Factors {
  float before[kColumns<kHeads>], unit[kColumns<kHeads>];
  bool rescale;  // `before` is not 1 everywhere in this warp
};

// Add a unit's sums to the totals. A unit without keys has the largest score -inf and the sum 0.
template <int kHeads>
__device__ __forceinline__ Factors<kHeads> add_unit(Totals<kHeads>& totals, const float (&largest)[kColumns<kHeads>],
                                                    const float (&sum)[kColumns<kHeads>]) {
  Factors<kHeads> factors;
  bool raised = false;
#pragma unroll
  for (int column = 0; column < kColumns<kHeads>; ++column) {
    const float reference = totals.reference[column], unit = largest[column];
    const float rise = unit == reference ? 0.0f : unit - reference;  // both may be -inf
    const bool raise = rise > kSlack;
    const float power = ptx::ex2_approx_ftz(raise ? -rise : rise);
    factors.before[column] = raise ? power : 1.0f;
    factors.unit[column] = raise ? 1.0f : power;
    if (raise) totals.reference[column] = unit;
    raised = raised || raise;
    totals.sum[column] = __fmaf_rn(sum[column], factors.unit[column],
                                   __fmul_rn(totals.sum[column], factors.before[column]));
  }
  factors.rescale = __any_sync(kAllLanes, raised);
  return factors;
}

// Make room for a unit in the output sums (kHeads / 2 values of a thread in 64 rows); needed where factors.rescale.
template <int kHeads>
__device__ __forceinline__ void rescale_output(float (&output)[kHeads / 2], const Factors<kHeads>& factors) {
#pragma unroll
  for (int i = 0; i < kHeads / 2; ++i) output[i] = __fmul_rn(output[i], factors.before[i / 4 * 2 + i % 2]);
}

// Add the output of a unit.
template <int kHeads>
__device__ __forceinline__ void add_output(float (&output)[kHeads / 2], const float (&unit)[kHeads / 2],
                                           const Factors<kHeads>& factors) {
#pragma unroll
  for (int i = 0; i < kHeads / 2; ++i) {
    output[i] = __fmaf_rn(unit[i], factors.unit[i / 4 * 2 + i % 2], output[i]);
  }
}

// A row without keys, and one whose sum is NaN, has the output 0.
__device__ __forceinline__ float reciprocal_of_denominator(float reference, float sum, float sink) {
  return sum > 0 ? 1.0f / (sum + exp2f(sink * kLog2E - reference)) : 0.0f;
}

__device__ __forceinline__ float log_sum_exp(float reference, float sum) {
  return (reference + log2f(sum)) * kLn2;
}

}  // namespace dsv4

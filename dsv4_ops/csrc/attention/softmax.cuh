// Softmax over units of keys whose results are added up in order, and what becomes of the sum.
//
// A warpgroup holds scores, weights and output with heads as columns (the layout of ptx::wgmma): a thread has kHeads /
// 4 columns, 8 * j + 2 * (lane % 4) + i, and of each the same rows. Scores are in units of log 2: score * log2(e) /
// sqrt(D).
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace dsv4 {

constexpr int kWarpgroup = 128;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kScoreScale = kLog2E * 0.04419417382415922f;  // 512^-0.5: of a product of query and key
constexpr float kLn2 = 0.6931471805599453f;

template <int kHeads>
constexpr int kColumns = kHeads / 4;  // of a thread

// The head of a thread's column.
__device__ __forceinline__ int head_of_column(int column, int lane) {
  return column / 2 * 8 + lane % 4 * 2 + column % 2;
}

struct Larger {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
  __device__ float operator()(float a, float b) const { return __fadd_rn(a, b); }
};

// One step of reduce_columns: lanes `kDistance` apart share out the kLeft columns that both go on with, or, if there is
// one left, do the same work. `column` is the first of those that this lane keeps.
template <int kLeft, int kDistance, int kCount, typename Operation>
__device__ __forceinline__ void reduce_step(float (&values)[kCount], int& column, bool& writes, Operation operation) {
  const bool upper = threadIdx.x & kDistance;
  if constexpr (kLeft > 1) {
    constexpr int kHalf = kLeft / 2;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float kept = upper ? values[kHalf + i] : values[i], sent = upper ? values[i] : values[kHalf + i];
      values[i] = operation(kept, __shfl_xor_sync(kAllLanes, sent, kDistance));
    }
    column += upper ? kHalf : 0;
  } else {
    values[0] = operation(values[0], __shfl_xor_sync(kAllLanes, values[0], kDistance));
    writes = writes && !upper;
  }
}

// What the four warps found about each head, [kHeads][4], in shared memory.
constexpr int kWarpsOfGroup = 4;

// Combine each column over the 8 lanes that hold it, and store what this warp has found. The order of a sum does not
// depend on kHeads.
template <int kHeads, typename Operation>
__device__ __forceinline__ void reduce_columns(float (&values)[kColumns<kHeads>], float* results, Operation operation) {
  constexpr int kAll = kColumns<kHeads>;
  constexpr auto half = [](int count) { return count > 1 ? count / 2 : 1; };
  constexpr int kLeft = half(half(half(kAll)));
  int column = 0;
  bool writes = true;
  reduce_step<kAll, 16>(values, column, writes, operation);
  reduce_step<half(kAll), 8>(values, column, writes, operation);
  reduce_step<half(half(kAll)), 4>(values, column, writes, operation);
  if (!writes) return;
  const int warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kLeft; ++i) results[head_of_column(column + i, lane) * kWarpsOfGroup + warp] = values[i];
}

// Of one head, in order.
template <typename Operation>
__device__ __forceinline__ float combine_warps(const float* results, int head, Operation operation) {
  const float4 of_warps = reinterpret_cast<const float4*>(results)[head];
  return operation(operation(of_warps.x, of_warps.y), operation(of_warps.z, of_warps.w));
}

// What a unit and what came before it are multiplied by when they are added.
struct Step {
  float before, unit;
};

// Weights of a row are relative to the score `reference`, the largest of some unit. It is only raised when a unit
// exceeds it by more than kSlack, so that output sums are rarely rescaled; weights up to 2^kSlack do no harm. All that
// follows from the row's own scores alone. A unit without keys has the largest score -inf.
constexpr float kSlack = 8.0f;

__device__ __forceinline__ Step raise_reference(float& reference, float largest) {
  const float rise = largest == reference ? 0.0f : largest - reference;  // both may be -inf
  const bool raise = rise > kSlack;
  const float power = ptx::ex2_approx_ftz(raise ? -rise : rise);
  if (raise) reference = largest;
  return {raise ? power : 1.0f, raise ? 1.0f : power};
}

// Sum of the weights of one head over the units so far.
struct Total {
  float reference = -INFINITY, sum = 0.0f;

  __device__ __forceinline__ Step add(float largest, float unit_sum) {
    const Step step = raise_reference(reference, largest);
    sum = __fmaf_rn(unit_sum, step.unit, __fmul_rn(sum, step.before));
    return step;
  }
};

// The values of a thread's columns, from the lanes of its warp, of which lane l has that of head l % kHeads.
template <int kHeads>
__device__ __forceinline__ void take_columns(float own, float (&values)[kColumns<kHeads>]) {
  static_assert(kHeads <= kWarp);
#pragma unroll
  for (int column = 0; column < kColumns<kHeads>; ++column) {
    values[column] = __shfl_sync(kAllLanes, own, head_of_column(column, threadIdx.x % kWarp));
  }
}

// The steps of a thread's columns. Were each thread to compute them, that would be more instructions than all else that
// adds a unit.
template <int kHeads>
struct Steps {
  bool rescale;  // `before` is not 1 everywhere in this warp; else it is not set
  float before[kColumns<kHeads>], unit[kColumns<kHeads>];

  __device__ __forceinline__ explicit Steps(const Step& own) : rescale(__any_sync(kAllLanes, own.before != 1.0f)) {
    take_columns<kHeads>(own.unit, unit);
    if (rescale) take_columns<kHeads>(own.before, before);
  }
};

// Make room for a unit in the output sums (kHeads / 2 values of a thread in 64 rows); needed where steps.rescale.
template <int kHeads>
__device__ __forceinline__ void rescale_output(float (&output)[kHeads / 2], const Steps<kHeads>& steps) {
#pragma unroll
  for (int i = 0; i < kHeads / 2; ++i) output[i] = __fmul_rn(output[i], steps.before[i / 4 * 2 + i % 2]);
}

// Add the output of a unit.
template <int kHeads>
__device__ __forceinline__ void add_output(float (&output)[kHeads / 2], const float (&unit)[kHeads / 2],
                                           const Steps<kHeads>& steps) {
#pragma unroll
  for (int i = 0; i < kHeads / 2; ++i) output[i] = __fmaf_rn(unit[i], steps.unit[i / 4 * 2 + i % 2], output[i]);
}

// A row without keys, and one whose sum is NaN, has the output 0.
__device__ __forceinline__ float reciprocal_of_denominator(const Total& total, float sink) {
  return total.sum > 0 ? 1.0f / (total.sum + exp2f(sink * kLog2E - total.reference)) : 0.0f;
}

__device__ __forceinline__ float log_sum_exp(const Total& total) { return (total.reference + log2f(total.sum)) * kLn2; }

}  // namespace dsv4

// What the first kernel of sparse_attention_split.cu hands to the second about a unit of a row: for every 8 heads their
// weights, then of each the largest score and the sum.
#pragma once

#include "attention/producer.cuh"
#include "attention/softmax.cuh"

namespace dsv4 {

constexpr int kHandedWeights = kUnit * 8 * 2;                      // bytes of weights of 8 heads
constexpr int kHandedBytes = kHandedWeights + 8 * sizeof(float2);  // and their totals

struct HandedUnit {
  uint8_t* data;

  __device__ __forceinline__ HandedUnit(float* partials, int padded_heads, int64_t unit)
      : data(reinterpret_cast<uint8_t*>(partials) + unit * (padded_heads / 8 * kHandedBytes)) {}
  __device__ __forceinline__ uint8_t* of_heads(int first_head) const { return data + first_head / 8 * kHandedBytes; }
};

// Largest score and sum of head number `head` of those whose weights start at `weights`.
__device__ __forceinline__ float2* totals_of(uint8_t* weights, int head) {
  return reinterpret_cast<float2*>(weights + head / 8 * kHandedBytes + kHandedWeights) + head % 8;
}

}  // namespace dsv4

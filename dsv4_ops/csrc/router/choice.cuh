// What the kernels of gate_topk share: keys of a lane, and what becomes of the chosen experts.
#pragma once

#include <type_traits>

#include "common/reduce.cuh"
#include "router/router.h"

namespace dsv4 {

// Keys of a lane's experts from shared memory, at a multiple of 16 bytes.
template <int kPerLane>
__device__ __forceinline__ void load_keys(const uint32_t* keys, uint32_t (&mine)[kPerLane]) {
  static_assert(kPerLane % 4 == 0, "whole vectors");
#pragma unroll
  for (int i = 0; i < kPerLane; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(keys + i);
    mine[i] = four.x, mine[i + 1] = four.y, mine[i + 2] = four.z, mine[i + 3] = four.w;
  }
}

// Ids and weights of a row by a warp, of which lane j has the id of slot j. scores: those of all experts.
__device__ __forceinline__ void store_choice(const GateChoice& choice, int64_t row, int id, const float* scores,
                                             int experts) {
  const int lane = threadIdx.x % kWarp;
  float score = 0.0f;
  if (lane < choice.k) score = id < experts ? scores[id] : __int_as_float(0x7FC00000);
  const float sum = sum_lanes(score);
  if (lane >= choice.k) return;
  const int64_t slot = row * choice.k + lane;
  choice.ids[slot] = id;
  choice.weights[slot] = __fmul_rn(__fdiv_rn(score, __fadd_rn(sum, 1e-20f)), choice.route_scale);
}

// function(experts of a lane) as a constant.
template <typename Function>
cudaError_t with_experts_per_lane(int experts, Function function) {
  if (experts <= 8 * kWarp) return function(std::integral_constant<int, 8>{});
  if (experts <= 12 * kWarp) return function(std::integral_constant<int, 12>{});
  return function(std::integral_constant<int, kMaxExperts / kWarp>{});
}

}  // namespace dsv4

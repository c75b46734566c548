// gate_topk: the k experts of a row with the largest sqrt(softplus(logit)) + bias, and their weights.
//
//   1. score = sqrt(softplus(logit)) of every expert; key = score + bias as an integer in the same order
//   2. k rounds of: the largest key of the row, lowest id on ties, is chosen and taken out
//   3. weight = score / (sum of the chosen scores + 1e-20) * route_scale
//
// This is the kernel for few rows: a CTA of 8 warps owns a row. All of them make scores, the first one chooses: a lane
// holds experts [kPerLane * lane, kPerLane * (lane + 1)) in registers, so that the lowest lane with the largest key
// holds the lowest id; in the end lane j holds slot j. Where every slot of a row is fixed (a layer with a hash table)
// there are no rounds. gate_topk_many.cu is the one for many rows; both give a row the same bits.
//
// Order as in torch: NaN above everything, a tie (also of NaNs) to the lowest id. A fixed id >= E, which the reference
// refuses, is passed on and gets the score NaN; nothing is read for it.
//
// Shared memory: 32 * kPerLane keys and as many scores, 8 bytes an expert.
// Floor: 4 bytes an expert and part are read. What bounds it is the latency of k dependent rounds. A lane that sorts
// its keys first needs fewer instructions a round, but the sort is on the way to the first: 256 experts, one row, 1.44
// us without it and 1.78 with it (H200, 2026-11-25).
#include "common/launch.cuh"
#include "common/ordered.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "router/choice.cuh"
#include "router/router.h"
#include "router/score.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 8 * kWarp;
constexpr int kPartBatch = 8;  // parts of one half that are loaded before they are added

// The sum of `count` parts from left to right.
__device__ __forceinline__ float sum_parts(const float* part, int count, int experts) {
  float sum = 0.0f;
  for (int first = 0; first < count; first += kPartBatch) {
    float values[kPartBatch];
#pragma unroll
    for (int i = 0; i < kPartBatch; ++i) {
      values[i] = first + i < count ? part[static_cast<int64_t>(first + i) * experts] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kPartBatch; ++i) sum += values[i];
  }
  return sum;
}

// A logit of any number of parts: the sum of its halves.
__device__ __forceinline__ float load_logit(const float* part, int parts, int experts) {
  const int half = (parts + 1) / 2;
  const float* const rest = part + static_cast<int64_t>(half) * experts;
  return sum_parts(part, half, experts) + sum_parts(rest, parts - half, experts);
}

// Largest of the keys, in few dependent steps.
template <int kCount>
__device__ __forceinline__ uint32_t largest_of(const uint32_t (&keys)[kCount]) {
  if constexpr (kCount == 1) {
    return keys[0];
  } else {
    constexpr int kHalf = (kCount + 1) / 2;
    uint32_t half[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) half[i] = i + kHalf < kCount ? max(keys[i], keys[i + kHalf]) : keys[i];
    return largest_of(half);
  }
}

// Chooses k times; lane j returns the j-th choice. keys: those of this lane's experts, which are used up.
template <int kPerLane>
__device__ __forceinline__ int choose(uint32_t (&keys)[kPerLane], int lane, int k) {
  int chosen = 0;
  for (int slot = 0; slot < k; ++slot) {
    const uint32_t largest = largest_of(keys);
    const uint32_t best = max_lanes(largest);
    int place = kPerLane - 1;  // the first place of this lane's largest key: found while the maximum is on its way
#pragma unroll
    for (int i = kPerLane - 2; i >= 0; --i) {
      if (keys[i] == largest) place = i;
    }
    const int winner = __ffs(__ballot_sync(kAllLanes, largest == best)) - 1;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (lane == winner && i == place) keys[i] = 0;
    }
    const int id = __shfl_sync(kAllLanes, lane * kPerLane + place, winner);
    if (lane == slot) chosen = id;
  }
  return chosen;
}

template <int kPerLane, bool kOnePart>
__global__ void __launch_bounds__(kThreads)
    gate_topk_kernel(const float* logits, int64_t stride, int parts, int experts, GateChoice choice) {
  constexpr int kSlots = kPerLane * kWarp, kPerThread = (kSlots + kThreads - 1) / kThreads;
  __shared__ alignas(16) uint32_t keys[kSlots];
  __shared__ float scores[kSlots];
  const int thread = threadIdx.x;
  float bias[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int expert = thread + i * kThreads;
    bias[i] = expert < experts ? choice.bias[expert] : 0.0f;
  }
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t row = blockIdx.x;
  const int fixed = thread < choice.k ? choice.fixed_ids[row * choice.fixed_stride + thread] : 0;

  // 1. scores and keys
  float logit[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int expert = thread + i * kThreads;
    const float* const part = logits + row * stride + expert;
    logit[i] = expert < experts ? kOnePart ? *part : load_logit(part, parts, experts) : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int expert = thread + i * kThreads;
    if (expert >= kSlots) continue;
    const float score = score_of(logit[i]);
    scores[expert] = score;
    keys[expert] = expert < experts ? ordered(__fadd_rn(score, bias[i])) : 0;
  }
  __syncthreads();
  if (thread >= kWarp) return;

  // 2. the chosen experts, slot j in lane j
  int id = fixed;
  if (!__all_sync(kAllLanes, fixed >= 0)) {
    uint32_t mine[kPerLane];
    load_keys(keys + thread * kPerLane, mine);
    const int chosen = choose(mine, thread, choice.k);
    if (fixed < 0) id = chosen;
  }

  // 3. their weights
  store_choice(choice, row, id, scores, experts);
}

}  // namespace

cudaError_t launch_gate_topk(const float* logits, int64_t rows, int64_t stride, int parts, int experts,
                             const GateChoice& choice, cudaStream_t stream) {
  if (rows > kFewRows) return launch_gate_topk_many(logits, rows, stride, parts, experts, choice, stream);
  return with_experts_per_lane(experts, [&](auto per_lane) {
    const auto kernel = parts == 1 ? gate_topk_kernel<per_lane(), true> : gate_topk_kernel<per_lane(), false>;
    return launch_kernel(kernel, {dim3(rows), dim3(kThreads), stream}, logits, stride, parts, experts, choice);
  });
}

}  // namespace dsv4

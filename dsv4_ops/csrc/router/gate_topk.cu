// gate_topk: the k experts of a row with the largest sqrt(softplus(logit)) + bias, and their weights.
//
//   1. score = sqrt(softplus(logit)) of every expert; key = score + bias as an integer in the same order
//   2. k rounds of: the largest key of the row, lowest id on ties, is chosen and taken out
//   3. weight = score / (sum of the chosen scores + 1e-20) * route_scale
//
// With few rows a CTA of 8 warps owns a row: all of them make scores, the first one chooses. With many rows a warp
// owns a row and a CTA of 4 warps owns four. In the rounds a lane holds experts [kPerLane * lane, kPerLane * (lane +
// 1)) in registers, so that the lowest lane with the largest key holds the lowest id; in the end lane j holds slot j.
// Where every slot of a row is fixed (a layer with a hash table) there are no rounds.
//
// Order as in torch: NaN above everything, a tie (also of NaNs) to the lowest id. A fixed id >= E, which the reference
// refuses, is passed on and gets the score NaN; nothing is read for it.
//
// Shared memory of a row: 32 * kPerLane keys and as many scores, 8 bytes an expert.
// Floor: 4 bytes an expert and part are read. What bounds it is, for one row, the latency of k dependent rounds, and
// for thousands the instructions of exp, log1p, square root and rounds: about 80 for each expert of a lane. 256
// experts: one row 1.44 us, 4096 rows 7.7 (H200, 2026-11-25). A lane that sorts its keys first needs about a third of
// the instructions a round: 6.1 us for 4096 rows, but 1.78 for one, where the sort is on the way to the first round.
#include "common/launch.cuh"
#include "common/ordered.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "router/router.h"

namespace dsv4 {
namespace {

constexpr int kPartBatch = 8;  // parts of one half that are loaded before they are added

__device__ __forceinline__ float score_of(float logit) {
  return __fsqrt_rn(logit > 20.0f ? logit : log1pf(expf(logit)));  // threshold of torch's softplus
}

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

// kParts 1: a logit, 2: its halves, 0: any number of parts.
template <int kParts>
__device__ __forceinline__ float load_logit(const float* part, int parts, int experts) {
  if constexpr (kParts == 1) return part[0];
  if constexpr (kParts == 2) return part[0] + part[experts];
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

template <int kRowWarps, int kCtaWarps, int kPerLane, int kParts>
__global__ void __launch_bounds__(kCtaWarps* kWarp)
    gate_topk_kernel(const float* logits, int64_t rows, int64_t stride, int parts, int experts, GateChoice choice) {
  constexpr int kRowThreads = kRowWarps * kWarp, kCtaRows = kCtaWarps / kRowWarps;
  constexpr int kSlots = kPerLane * kWarp, kPerThread = (kSlots + kRowThreads - 1) / kRowThreads;
  __shared__ alignas(16) uint32_t all_keys[kCtaRows][kSlots];
  __shared__ float all_scores[kCtaRows][kSlots];
  const int row_in_cta = threadIdx.x / kRowThreads, thread = threadIdx.x % kRowThreads;
  uint32_t* const keys = all_keys[row_in_cta];
  float* const scores = all_scores[row_in_cta];
  float bias[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int expert = thread + i * kRowThreads;
    bias[i] = expert < experts ? choice.bias[expert] : 0.0f;
  }
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCtaRows + row_in_cta;
  if (row >= rows) return;
  const int fixed = thread < choice.k ? choice.fixed_ids[row * choice.fixed_stride + thread] : 0;

  // 1. scores and keys
  float logit[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int expert = thread + i * kRowThreads;
    logit[i] = expert < experts ? load_logit<kParts>(logits + row * stride + expert, parts, experts) : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int expert = thread + i * kRowThreads;
    if (expert >= kSlots) continue;
    const float score = score_of(logit[i]);
    scores[expert] = score;
    keys[expert] = expert < experts ? ordered(__fadd_rn(score, bias[i])) : 0;
  }
  if constexpr (kRowWarps == 1) {
    __syncwarp();
  } else {
    __syncthreads();
    if (thread >= kWarp) return;
  }

  // 2. the chosen experts, slot j in lane j
  int id = fixed;
  if (!__all_sync(kAllLanes, fixed >= 0)) {
    uint32_t mine[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(keys + thread * kPerLane + i);
      mine[i] = four.x, mine[i + 1] = four.y, mine[i + 2] = four.z, mine[i + 3] = four.w;
    }
    const int chosen = choose(mine, thread, choice.k);
    if (fixed < 0) id = chosen;
  }

  // 3. their weights
  float score = 0.0f;
  if (thread < choice.k) score = id < experts ? scores[id] : __int_as_float(0x7FC00000);
  const float sum = sum_lanes(score);
  if (thread < choice.k) {
    const int64_t slot = row * choice.k + thread;
    choice.ids[slot] = id;
    choice.weights[slot] = __fmul_rn(__fdiv_rn(score, __fadd_rn(sum, 1e-20f)), choice.route_scale);
  }
}

template <int kPerLane>
cudaError_t launch(const float* logits, int64_t rows, int64_t stride, int parts, int experts, const GateChoice& choice,
                   cudaStream_t stream) {
  const auto run = [&](auto kernel, int row_warps, int cta_warps) {
    const int cta_rows = cta_warps / row_warps;
    const Launch at{dim3((rows + cta_rows - 1) / cta_rows), dim3(cta_warps * kWarp), stream};
    return launch_kernel(kernel, at, logits, rows, stride, parts, experts, choice);
  };
  if (rows > kFewRows) {
    return parts == 1 ? run(gate_topk_kernel<1, 4, kPerLane, 1>, 1, 4) : run(gate_topk_kernel<1, 4, kPerLane, 2>, 1, 4);
  }
  return parts == 1 ? run(gate_topk_kernel<8, 8, kPerLane, 1>, 8, 8) : run(gate_topk_kernel<8, 8, kPerLane, 0>, 8, 8);
}

}  // namespace

cudaError_t launch_gate_topk(const float* logits, int64_t rows, int64_t stride, int parts, int experts,
                             const GateChoice& choice, cudaStream_t stream) {
  if (experts <= 8 * kWarp) return launch<8>(logits, rows, stride, parts, experts, choice, stream);
  if (experts <= 12 * kWarp) return launch<12>(logits, rows, stride, parts, experts, choice, stream);
  return launch<kMaxExperts / kWarp>(logits, rows, stride, parts, experts, choice, stream);
}

}  // namespace dsv4

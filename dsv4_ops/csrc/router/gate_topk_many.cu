// gate_topk for many rows: a warp owns a row, a CTA of 4 warps four rows. gate_topk.cu says what is computed, and has
// the kernel for few rows.
//
// A lane has experts [kPerLane * lane, kPerLane * (lane + 1)), from the load of their logits on. It sorts their keys;
// in k rounds the largest key of all lists is taken off, lowest lane on ties, and in the end it is found which expert
// of its lane had it. So a round takes 20 instructions, a third of a round without lists.
//
// Shared memory of a row: 32 * kPerLane keys and as many scores, 8 bytes an expert.
// Floor: 4 bytes an expert and part are read. What bounds it are instructions: about 45 for each expert of a lane.
// H200, 2026-11-25: 4096 rows of 256 experts 7.5 us, no less than one key at a time without lists (7.7).
#include "common/launch.cuh"
#include "common/ordered.cuh"
#include "common/ptx.cuh"
#include "router/choice.cuh"
#include "router/router.h"
#include "router/score.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 4;  // and rows of a CTA
constexpr int kThreads = kWarps * kWarp;

// Batcher's merge exchange, largest first: sorted runs of kRun keys become runs of twice as many, in steps that compare
// keys kDistance apart.
template <int kCount, int kRun = 1, int kDistance = kRun>
__device__ __forceinline__ void sort(uint32_t (&keys)[kCount]) {
  constexpr int kFirst = kDistance % kRun;
#pragma unroll
  for (int i = kFirst; i + kDistance < kCount; ++i) {
    const int other = i + kDistance;
    if ((i - kFirst) % (2 * kDistance) >= kDistance || i / (2 * kRun) != other / (2 * kRun)) continue;
    const uint32_t larger = max(keys[i], keys[other]);
    keys[other] = min(keys[i], keys[other]);
    keys[i] = larger;
  }
  if constexpr (kDistance > 1) {
    sort<kCount, kRun, kDistance / 2>(keys);
  } else if constexpr (2 * kRun < kCount) {
    sort<kCount, 2 * kRun>(keys);
  }
}

// Chooses k times; lane j returns the j-th choice. keys: those of this lane's experts, which are used up; all_keys:
// those of all experts.
//
// The rounds only take the largest key off a sorted list, and note it with the lane whose list it was. Which of a
// lane's experts had it is found once, for all slots together: equal keys of one lane are chosen one after the other.
template <int kPerLane>
__device__ __forceinline__ int choose(uint32_t (&keys)[kPerLane], const uint32_t* all_keys, int lane, int k) {
  sort(keys);
  const uint32_t lower_lanes = (1u << lane) - 1;
  uint32_t key = 0, holders = 1;
#pragma unroll 1
  for (int slot = 0; slot < k; ++slot) {
    const uint32_t best = max_lanes(keys[0]);
    const uint32_t with_best = __ballot_sync(kAllLanes, keys[0] == best);
    if (lane == slot) key = best, holders = with_best;
    if (keys[0] == best && (with_best & lower_lanes) == 0) {
#pragma unroll
      for (int i = 0; i + 1 < kPerLane; ++i) keys[i] = keys[i + 1];
      keys[kPerLane - 1] = 0;
    }
  }
  const int holder = __ffs(holders) - 1;
  const uint32_t key_before = __shfl_up_sync(kAllLanes, key, 1);
  const int holder_before = __shfl_up_sync(kAllLanes, holder, 1);
  const uint32_t repeats = __ballot_sync(kAllLanes, lane > 0 && key_before == key && holder_before == holder);
  uint32_t places = 0;  // where the key is among those of its lane
#pragma unroll
  for (int i = 0; i < kPerLane; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(all_keys + holder * kPerLane + i);
    places |= (four.x == key) << i | (four.y == key) << (i + 1);
    places |= (four.z == key) << (i + 2) | (four.w == key) << (i + 3);
  }
  // Slots of the same key and lane right before this one took the first of them.
#pragma unroll 1
  for (int taken = __clz(~(repeats << (kWarp - 1 - lane))); taken > 0; --taken) places &= places - 1;
  return holder * kPerLane + __ffs(places) - 1;
}

// kCount neighbouring values, those that exist, and `fill`; `vectors`: all of them do, at multiples of 16 bytes.
template <int kCount>
__device__ __forceinline__ void load_values(const float* values, int first, int end, bool vectors, float fill,
                                            float (&loaded)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    if (vectors) {
      const float4 four = *reinterpret_cast<const float4*>(values + first + i);
      loaded[i] = four.x, loaded[i + 1] = four.y, loaded[i + 2] = four.z, loaded[i + 3] = four.w;
      continue;
    }
#pragma unroll
    for (int j = i; j < i + 4; ++j) loaded[j] = first + j < end ? values[first + j] : fill;
  }
}

// kParts: 1, or 2 of which a logit is the sum. `vectors`: experts fill all lanes, rows start at multiples of 16 bytes.
template <int kPerLane, int kParts>
__global__ void __launch_bounds__(kThreads) gate_topk_many_kernel(const float* logits, int64_t rows, int64_t stride,
                                                                  int experts, bool vectors, GateChoice choice) {
  constexpr int kSlots = kPerLane * kWarp;
  __shared__ alignas(16) uint32_t all_keys[kWarps][kSlots];
  __shared__ alignas(16) float all_scores[kWarps][kSlots];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, first = lane * kPerLane;
  uint32_t* const keys = all_keys[warp];
  float* const scores = all_scores[warp];
  // Slots past the last expert get the key of -infinity. A real one with that key has a lower id and is chosen before.
  float bias[kPerLane];
  load_values(choice.bias, first, experts, vectors, -INFINITY, bias);
  float largest = 0.0f;  // NaN if a bias is, or a logit
#pragma unroll
  for (const float value : bias) largest = value == value ? largest : value;
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (row >= rows) return;
  const int fixed = lane < choice.k ? choice.fixed_ids[row * choice.fixed_stride + lane] : 0;

  // 1. scores and keys
  float logit[kPerLane];
  load_values(logits + row * stride, first, experts, vectors, 0.0f, logit);
  if constexpr (kParts == 2) {
    float half[kPerLane];
    load_values(logits + row * stride + experts, first, experts, vectors, 0.0f, half);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) logit[i] += half[i];
  }
  uint32_t mine[kPerLane];
#pragma unroll
  for (const float value : logit) largest = ptx::max_nan(largest, fabsf(value));
#pragma unroll
  for (int i = 0; i < kPerLane; i += 4) {
    float score[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      score[j] = score_of_plain(logit[i + j]);
      mine[i + j] = ordered_number(__fadd_rn(score[j], bias[i + j]));
    }
    *reinterpret_cast<float4*>(scores + first + i) = {score[0], score[1], score[2], score[3]};
    *reinterpret_cast<uint4*>(keys + first + i) = {mine[i], mine[i + 1], mine[i + 2], mine[i + 3]};
  }
  if (!(largest <= kPlainLogit)) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) scores[first + i] = logit[i];
#pragma unroll 1
    for (int expert = first; expert < min(first + kPerLane, experts); ++expert) {
      const float score = score_of(scores[expert]);
      scores[expert] = score;
      keys[expert] = ordered(__fadd_rn(score, choice.bias[expert]));
    }
    load_keys(keys + first, mine);
  }
  __syncwarp();

  // 2. the chosen experts, slot j in lane j
  int id = fixed;
  if (!__all_sync(kAllLanes, fixed >= 0)) {
    const int chosen = choose(mine, keys, lane, choice.k);
    if (fixed < 0) id = chosen;
  }

  // 3. their weights
  store_choice(choice, row, id, scores, experts);
}

}  // namespace

cudaError_t launch_gate_topk_many(const float* logits, int64_t rows, int64_t stride, int parts, int experts,
                                  const GateChoice& choice, cudaStream_t stream) {
  const auto aligned = [](const float* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
  return with_experts_per_lane(experts, [&](auto per_lane) {
    const bool vectors = experts == per_lane() * kWarp && stride % 4 == 0 && aligned(logits) && aligned(choice.bias);
    const Launch at{dim3((rows + kWarps - 1) / kWarps), dim3(kThreads), stream};
    const auto kernel = parts == 1 ? gate_topk_many_kernel<per_lane(), 1> : gate_topk_many_kernel<per_lane(), 2>;
    return launch_kernel(kernel, at, logits, rows, stride, experts, vectors, choice);
  });
}

}  // namespace dsv4

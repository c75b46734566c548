// gate_topk: the k experts of a row with the largest sqrt(softplus(logit)) + bias, and their weights.
//
//   1. score = sqrt(softplus(logit)) of every expert; key = score + bias as an integer in the same order
//   2. every lane sorts the keys of its experts; k rounds of: the largest key of the row, lowest id on ties, is taken
//   3. weight = score / (sum of the chosen scores + 1e-20) * route_scale
//
// With few rows a CTA of 8 warps owns a row: all of them make scores, the first one chooses. With many rows a warp
// owns a row and a CTA of 4 warps owns four. In the rounds a lane holds experts [kPerLane * lane, kPerLane * (lane +
// 1)), so that the lowest lane with the largest key has the lowest id; in the end lane j holds slot j.
// Where every slot of a row is fixed (a layer with a hash table) there are no rounds.
//
// Order as in torch: NaN above everything, a tie (also of NaNs) to the lowest id. A fixed id >= E, which the reference
// refuses, is passed on and gets the score NaN; nothing is read for it.
//
// Shared memory of a row: 32 * kPerLane keys and as many scores, 8 bytes an expert.
// Floor: 4 bytes an expert and part are read. What bounds it is, for one row, the latency of k dependent rounds, and
// for thousands the instructions of exp, log1p, square root and rounds: about 90 for each expert of a lane.
#include "common/launch.cuh"
#include "common/ordered.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "router/router.h"

namespace dsv4 {
namespace {

constexpr int kPartBatch = 8;  // parts of one half that are loaded before they are added
constexpr float kSoftplusThreshold = 20.0f;  // of torch

// sqrt(softplus(logit)) of any logit.
__device__ __forceinline__ float score_of_any(float logit) {
  return __fsqrt_rn(logit > kSoftplusThreshold ? logit : log1pf(expf(logit)));
}

constexpr float kPlainLogit = 64.0f;

// Bit for bit the same for magnitudes up to kPlainLogit, in a third of the instructions: log1pf and the root without
// their branches for numbers that do not occur then.
__device__ __forceinline__ float score_of_plain(float logit) {
  const float x = expf(logit);
  // 1 + x = 2^e (1 + m) with m in [-1/4, 1/2): log(1 + x) = e log 2 + log(1 + m)
  const uint32_t exponent = (__float_as_uint(__fadd_rz(x, 1.0f)) - 0x3F400000u) & 0xFF800000u;
  const float scale = __uint_as_float(0x40800000u - exponent);  // 4 / 2^e
  const float m = __fmaf_rn(0.25f, scale, -1.0f) + __uint_as_float(__float_as_uint(x) - exponent);
  const float e = static_cast<float>(static_cast<int>(exponent));  // times 2^23
  float p = __fmaf_rn(__uint_as_float(0xBD39BF78u), m, __uint_as_float(0x3DD80012u));
  p = __fmaf_rn(p, m, __uint_as_float(0xBE0778E0u));
  p = __fmaf_rn(p, m, __uint_as_float(0x3E146475u));
  p = __fmaf_rn(p, m, __uint_as_float(0xBE2A68DDu));
  p = __fmaf_rn(p, m, __uint_as_float(0x3E4CAF9Eu));
  p = __fmaf_rn(p, m, __uint_as_float(0xBE800042u));
  p = __fmaf_rn(p, m, __uint_as_float(0x3EAAAAE6u));
  p = __fmaf_rn(p, m, -0.5f);
  const float log1p = __fmaf_rn(e, 0x1p-23f * 0.693147182f, __fmaf_rn(m * p, m, m));
  const float softplus = logit > kSoftplusThreshold ? logit : log1p;
  // Newton's step from the approximate root gives the nearest number.
  const float inverse = ptx::rsqrt_approx_ftz(softplus), root = softplus * inverse;
  return __fmaf_rn(__fmaf_rn(-root, root, softplus), 0.5f * inverse, root);
}

// ordered() of a number other than -0, which is no sum of a positive score and a bias.
__device__ __forceinline__ uint32_t ordered_number(float value) {
  const int32_t bits = __float_as_int(value);
  return static_cast<uint32_t>(bits ^ (bits >> 31 | INT32_MIN));
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
  // Slots past the last expert get the key of -infinity. A real one with that key has a lower id and is chosen before.
  float bias[kPerThread];
  bool plain = true;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int expert = thread + i * kRowThreads;
    bias[i] = expert < experts ? choice.bias[expert] : -INFINITY;
    plain = plain && bias[i] == bias[i];
  }
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCtaRows + row_in_cta;
  if (row >= rows) return;
  const int fixed = thread < choice.k ? choice.fixed_ids[row * choice.fixed_stride + thread] : 0;

  // 1. scores and keys
  float logit[kPerThread];
  const auto load = [&](int count) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int expert = thread + i * kRowThreads;
      logit[i] = expert < count ? load_logit<kParts>(logits + row * stride + expert, parts, count) : 0.0f;
    }
  };
  if (kRowWarps == 1 && experts == kSlots) {
    load(kSlots);
  } else {
    load(experts);
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int expert = thread + i * kRowThreads;
    if (expert >= kSlots) continue;
    plain = plain && fabsf(logit[i]) <= kPlainLogit;
    const float score = score_of_plain(logit[i]);
    scores[expert] = score;
    keys[expert] = ordered_number(__fadd_rn(score, bias[i]));
  }
  if (!plain) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int expert = thread + i * kRowThreads;
      if (expert < kSlots) scores[expert] = logit[i];
    }
#pragma unroll 1
    for (int expert = thread; expert < experts; expert += kRowThreads) {
      const float score = score_of_any(scores[expert]);
      scores[expert] = score;
      keys[expert] = ordered(__fadd_rn(score, choice.bias[expert]));
    }
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
    const int chosen = choose(mine, keys, thread, choice.k);
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

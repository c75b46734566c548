// What the kernels of `sample` know about a row: its settings, its largest logit, its part of the workspace,
// candidates.
#pragma once

#include <cstdint>

#include "common/ordered.cuh"
#include "common/reduce.cuh"
#include "sampling/sample.h"

namespace dsv4 {

constexpr int kThreads = 256;  // of a CTA that works on a chunk

// A token and where it stands: larger is better. An integer in the order of the scaled logits, lowest index on ties.
__device__ __forceinline__ uint64_t rank_key(float scaled, uint32_t token) {
  return static_cast<uint64_t>(ordered(scaled)) << 32 | ~token;
}
__device__ __forceinline__ uint32_t token_of(uint64_t rank) { return ~static_cast<uint32_t>(rank); }
__device__ __forceinline__ float scaled_of(uint64_t rank) { return from_ordered(static_cast<uint32_t>(rank >> 32)); }

// A token with its noise. The reference takes the first of the largest noisy values in the order of ranks.
struct alignas(16) Candidate {
  uint64_t rank;
  uint32_t noisy;   // ordered(scaled logit + noise); 0: no token
  uint32_t unused;  // 0, so that all 16 bytes of a copy are written
};

__device__ __forceinline__ Candidate candidate_of(uint64_t rank, float noisy) { return {rank, ordered(noisy), 0}; }

__device__ __forceinline__ bool beats(const Candidate& a, const Candidate& b) {
  return a.noisy > b.noisy || (a.noisy == b.noisy && a.rank > b.rank);
}

// ---- reductions that every thread gets, in any order the same bits ----

__device__ __forceinline__ uint64_t max_lanes64(uint64_t value) {
  const uint32_t high = static_cast<uint32_t>(value >> 32), best = max_lanes(high);
  const uint32_t low = max_lanes(high == best ? static_cast<uint32_t>(value) : 0u);
  return static_cast<uint64_t>(best) << 32 | low;
}

__device__ __forceinline__ uint64_t sum_lanes64(uint64_t value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

__device__ __forceinline__ Candidate max_lanes(const Candidate& mine) {
  Candidate best{};
  best.noisy = max_lanes(mine.noisy);
  best.rank = max_lanes64(mine.noisy == best.noisy ? mine.rank : 0);
  return best;
}

// The same over a CTA of whole warps; `scratch` holds one element a warp and may be used again after the next barrier.
template <typename T, typename Reduce>
__device__ __forceinline__ T reduce_warps(T value, T* scratch, Reduce reduce) {
  value = reduce(value);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return reduce(lane < blockDim.x / kWarp ? scratch[lane] : T{});
}

__device__ __forceinline__ uint64_t max_warps64(uint64_t value, uint64_t* scratch) {
  return reduce_warps(value, scratch, [](uint64_t mine) { return max_lanes64(mine); });
}
__device__ __forceinline__ uint64_t sum_warps64(uint64_t value, uint64_t* scratch) {
  return reduce_warps(value, scratch, [](uint64_t mine) { return sum_lanes64(mine); });
}
__device__ __forceinline__ Candidate max_warps(const Candidate& mine, Candidate* scratch) {
  return reduce_warps(mine, scratch, [](const Candidate& one) { return max_lanes(one); });
}

// ---- workspace ----

struct RowWorkspace {
  uint64_t* histogram;  // [kBuckets]: tokens << 40 | what their masses lack
  uint64_t* listed;     // [kListed] ranks
  unsigned* listed_count;
  Candidate* sure;    // [chunks] best of the tokens that are kept for certain
  Candidate* maybe;   // [chunks] best of those that may be
  uint64_t* largest;  // [chunks] rank_key of the largest logit
};

__device__ __forceinline__ RowWorkspace workspace_of(const SampleBatch& batch, int64_t row) {
  uint64_t* const words = batch.workspace + row * batch.row_words;
  uint64_t* const listed = words + kBuckets;
  uint64_t* const count = listed + kListed;
  Candidate* const sure = reinterpret_cast<Candidate*>(count + 2);
  Candidate* const maybe = sure + batch.max_chunks;
  uint64_t* const largest = reinterpret_cast<uint64_t*>(maybe + batch.max_chunks);
  return {words, listed, reinterpret_cast<unsigned*>(count), sure, maybe, largest};
}

// ---- settings ----

struct Row {
  float temperature;
  float top_p;
  int top_k;
  bool by_rank;  // top-k takes part
  bool by_mass;  // top-p takes part
  uint64_t seed, counter;
};

// A temperature that is not above 0 (NaN too) is greedy, and so is a row without filters here: it is not filtered.
__device__ __forceinline__ Row load_row(const SampleBatch& batch, int64_t row) {
  const SampleSettings& settings = batch.settings;
  Row loaded{settings.temperature[row], settings.top_p[row], settings.top_k[row]};
  loaded.seed = settings.seed[row];
  loaded.counter = settings.counter[row];
  loaded.by_rank = loaded.top_k > 0 && loaded.top_k < batch.rows.width;
  loaded.by_mass = !(loaded.top_p >= 1.0f);
  if (!(loaded.top_p > 0.0f)) loaded.top_p = 0.0f;  // NaN keeps one token, as 0 does
  return loaded;
}

__device__ __forceinline__ bool draws(const Row& row) { return row.temperature > 0.0f; }
__device__ __forceinline__ bool filters(const Row& row) { return draws(row) && (row.by_rank || row.by_mass); }

// The largest of the chunks that are this thread's share: loads to start early. max_warps64 makes the row's of it.
__device__ __forceinline__ uint64_t share_of_largest(const SampleBatch& batch, const RowWorkspace& workspace) {
  uint64_t largest = 0;
  for (int i = threadIdx.x; i < batch.chunks; i += blockDim.x) largest = max(largest, workspace.largest[i]);
  return largest;
}

// Where the largest logit is not finite, all scaled logits that can win are NaN, and the reference takes the first of
// them: the token that is first in the order of the logits, as at temperature 0.
__device__ __forceinline__ bool is_finite(float value) { return fabsf(value) < __uint_as_float(0x7F800000u); }

__device__ __forceinline__ float scale(float logit, float largest, float temperature) {
  return __fdiv_rn(__fsub_rn(logit, largest), temperature);
}

// Logits of four neighbouring tokens. Returns how many there are; the others are left alone.
__device__ __forceinline__ int load_four(const SampleBatch& batch, const float* row, int64_t token,
                                         float (&logits)[4]) {
  const int count = static_cast<int>(max(int64_t{0}, min(int64_t{4}, batch.rows.width - token)));
  if (batch.vectors && count == 4) {
    const float4 four = *reinterpret_cast<const float4*>(row + token);
    logits[0] = four.x, logits[1] = four.y, logits[2] = four.z, logits[3] = four.w;
    return count;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) logits[i] = row[token + i];
  }
  return count;
}

}  // namespace dsv4

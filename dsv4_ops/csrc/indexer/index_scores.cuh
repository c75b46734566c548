// What the scoring kernels and the selection share on the device: what a row sees, and scores as integers.
#pragma once

#include <cstdint>

#include "indexer/scoring.h"

namespace dsv4 {

constexpr float kUnseen = -__builtin_huge_valf();

// Entries that the token at `position` sees.
__device__ __forceinline__ int visible_entries(int32_t position, int ratio, int capacity) {
  return min(static_cast<int>(static_cast<uint32_t>(max(position + 1, 0)) / ratio), capacity);
}

// Scores as integers in the order of a descending sort: NaN above infinity, -0 equal to 0. No score has the key 0.
__device__ __forceinline__ uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(__fadd_rn(score, 0.0f));
  const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return score == score ? key : 0xFFFFFFFFu;
}

__device__ __forceinline__ float score_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// A score to element `offset` of the sink, for `entry` of a tile; `seen` false where its row does not see the entry.
// Returns the key.
__device__ __forceinline__ uint32_t put_score(const ScoreSink& sink, int64_t offset, int entry, int capacity,
                                              float score, bool seen) {
  const uint32_t key = seen ? key_of(score) : 0;
  if (sink.scores == nullptr) {
    sink.keys[offset] = key;
  } else if (entry < capacity) {
    sink.scores[offset] = seen ? score : kUnseen;
  }
  return key;
}

}  // namespace dsv4

// What the scoring kernels and the selection share on the device: what a row sees, and where
// scores go, as numbers or as integers in their order.
#pragma once

#include <cstdint>

#include "common/ordered.cuh"
#include "indexer/scoring.h"

namespace dsv4 {

constexpr float kUnseen = -__builtin_huge_valf();

// Entries that the token at `position` sees.
__device__ __forceinline__ int visible_entries(int32_t position, int ratio, int capacity) {
  return min(static_cast<int>(static_cast<uint32_t>(max(position + 1, 0)) / ratio), capacity);
}

// A score to element `offset` of the sink, for `entry` of a tile; `seen` false where its row does not see the entry.
// Returns the key.
__device__ __forceinline__ uint32_t put_score(const ScoreSink& sink, int64_t offset, int entry, int capacity,
                                              float score, bool seen) {
  const uint32_t key = seen ? ordered(score) : 0;
  if (sink.scores == nullptr) {
    sink.keys[offset] = key;
  } else if (entry < capacity) {
    sink.scores[offset] = seen ? score : kUnseen;
  }
  return key;
}

}  // namespace dsv4

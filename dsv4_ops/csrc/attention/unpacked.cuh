// Where an entry lies among those that unpack_keys.cu has unpacked: one of zeros for absent keys, then of every
// sequence those of its window's ring and those of its compressed pages. An entry is 512 bf16 in the order of a tile.
#pragma once

#include "attention/attention.h"
#include "attention/keys.cuh"
#include "attention/tile.cuh"

namespace dsv4 {

constexpr int kUnpackedBytes = kDim * 2;
constexpr uint32_t kAbsentEntry = 0, kFirstEntry = 1;

__host__ __device__ __forceinline__ uint32_t entries_of_sequence(const KeySources& keys) {
  return static_cast<uint32_t>(keys.window_pool.max_pages) * keys.window_pool.page_size +
         static_cast<uint32_t>(keys.compressed_pool.max_pages) * keys.compressed_pool.page_size;
}

// Of a key of a row, whose entry in its pool is given.
__device__ __forceinline__ uint32_t unpacked_entry(const KeySources& keys, const RowKeys& row, int key, int entry) {
  if (entry < 0) return kAbsentEntry;
  const uint32_t first = kFirstEntry + static_cast<uint32_t>(row.sequence) * entries_of_sequence(keys);
  return first + (key < row.window_keys ? 0 : ring_entries(keys)) + entry;
}

}  // namespace dsv4

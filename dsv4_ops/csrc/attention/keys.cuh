// Which keys a row sees, in the order in which they are taken: the window from its oldest position on, then compressed
// entries. It follows from the row's position, its indices and the sizes of the pools alone.
#pragma once

#include "attention/attention.h"
#include "common/rope.cuh"

namespace dsv4 {

constexpr int kNoEntry = -1;

struct RowKeys {
  int64_t sequence;
  int position;
  int window_keys;         // number of keys of the window
  int first_entry;         // of the window pool
  int count;               // of all keys
  const int32_t* indices;  // of this row
};

__device__ __forceinline__ int ring_entries(const KeySources& keys) {
  return keys.window_pool.max_pages * keys.window_pool.page_size;
}

__device__ __forceinline__ RowKeys keys_of_row(const KeySources& keys, const Rope& rope, uint32_t row, int position) {
  RowKeys found;
  found.sequence = row / rope.tokens;
  found.position = position;
  found.window_keys = max(0, min(found.position + 1, keys.window));
  found.first_entry = found.window_keys > 0 ? (found.position - found.window_keys + 1) % ring_entries(keys) : 0;
  int compressed = keys.k;
  if (keys.ratio > 0) {
    const int entries = keys.compressed_pool.max_pages * keys.compressed_pool.page_size;
    compressed = min(max(found.position + 1, 0) / keys.ratio, entries);
  }
  found.count = found.window_keys + compressed;
  found.indices = keys.indices == nullptr ? nullptr : keys.indices + row * keys.indices_stride;
  return found;
}

// Reads the row's position: only after the wait.
__device__ __forceinline__ RowKeys keys_of_row(const KeySources& keys, const Rope& rope, uint32_t row) {
  return keys_of_row(keys, rope, row, *position_of(rope, row));
}

__device__ __forceinline__ int units_of_row(const RowKeys& row) { return (row.count + kUnit - 1) / kUnit; }

// Entry of key number `key`, in the window pool if that is below window_keys, else in the compressed pool; negative:
// none.
__device__ __forceinline__ int entry_of_key(const KeySources& keys, const RowKeys& row, int key) {
  if (key >= row.count) return kNoEntry;
  if (key < row.window_keys) {
    const int entry = row.first_entry + key;
    return entry < ring_entries(keys) ? entry : entry - ring_entries(keys);
  }
  const int place = key - row.window_keys;
  return row.indices == nullptr ? place : row.indices[place];
}

__device__ __forceinline__ int divide(int number, PageDivisor divisor) {
  return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(number)) * divisor.multiplier >> divisor.shift);
}

// Where an entry lies: its page, and its place there.
struct Place {
  const uint8_t* page;
  int slot;
};

__device__ __forceinline__ Place place_of_entry(const Pool& pool, PageDivisor page_size, int64_t sequence, int entry) {
  const int page = divide(entry, page_size);
  return {pool.data + pool.table[sequence * pool.table_stride + page] * pool.page_stride,
          entry - page * pool.page_size};
}

}  // namespace dsv4

// Where the keys of a producing warp of sparse_attention_wide.cu lie.
//
// Keys are looked up for a few tiles at a time, a batch, a lane for each key, in three steps that depend on each other:
// the index of its entry, the page, the scales. Each has the time of a batch. What is found goes through shared memory
// to the four lanes that load the key.
#pragma once

#include "attention/keys.cuh"
#include "attention/wide_tiles.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace dsv4::wide {

constexpr int kBatch = kWarp / kWarpKeys;  // tiles

// What an absent key has instead of an entry: zeros, with which products are harmless.
__device__ const uint4 absent_key[kEntryBytes / 16] = {};

class KeyFinder {
 public:
  // For producing warp number `warp`, which has `found` for itself.
  __device__ __forceinline__ KeyFinder(const KeySources& sources, const RowKeys& row, FoundKey (&found)[kWarp],
                                       int warp)
      : sources_(sources), row_(row), found_(ptx::shared_address(found)), warp_(warp) {
    find_entry(0);
    find_page(0);
    find_entry(1);
    find_key(0);
    find_page(1);
    find_entry(2);
  }

  // The keys of a batch take the place of those of the batch before it. By all lanes, batch by batch.
  __device__ __forceinline__ void advance(int batch) {
    const auto data = reinterpret_cast<uint64_t>(key_.data);
    present_ = __ballot_sync(kAllLanes, key_.data != absent());  // all lanes have read the batch before
    ptx::store_shared(found_ + threadIdx.x % kWarp * sizeof(FoundKey),
                      uint4{static_cast<uint32_t>(data), static_cast<uint32_t>(data >> 32), key_.scales.x,
                            key_.scales.y});
    find_key(batch + 1);
    find_page(batch + 2);
    find_entry(batch + 3);
    __syncwarp();
  }

  // Of the batch: a key of a tile, and a bit for each that is there.
  __device__ __forceinline__ FoundKey found(int unit, int key) const {
    const uint4 words = ptx::load_shared(found_ + (unit % kBatch * kWarpKeys + key) * sizeof(FoundKey));
    return {reinterpret_cast<const uint8_t*>(static_cast<uint64_t>(words.y) << 32 | words.x),
            uint2{words.z, words.w}};
  }
  __device__ __forceinline__ uint32_t present(int unit) const { return present_ >> unit % kBatch * kWarpKeys; }

 private:
  __device__ __forceinline__ static const uint8_t* absent() { return reinterpret_cast<const uint8_t*>(absent_key); }

  // Number of this lane's key.
  __device__ __forceinline__ int key_of(int batch) const {
    const int lane = threadIdx.x % kWarp;
    return (batch * kBatch + lane / kWarpKeys) * kUnit + warp_ * kWarpKeys + lane % kWarpKeys;
  }

  // As entry_of_key finds it; under way if it is an index.
  __device__ __forceinline__ void find_entry(int batch) {
    const int key = key_of(batch), place = key - row_.window_keys, ring = ring_entries(sources_);
    const bool exists = key < row_.count, window = place < 0;
    int entry = window ? row_.first_entry + key : place;
    if (window && entry >= ring) entry -= ring;
    entry_ = exists ? entry : kNoEntry;
    ptx::load_global_if(entry_, row_.indices + place, exists && !window && row_.indices != nullptr);
  }

  // Its page, under way.
  __device__ __forceinline__ void find_page(int batch) {
    const bool window = key_of(batch) < row_.window_keys;
    const Pool& pool = window ? sources_.window_pool : sources_.compressed_pool;
    const int page = divide(max(entry_, 0), window ? sources_.window_page : sources_.compressed_page);
    slot_ = entry_ < 0 ? kNoEntry : entry_ - page * pool.page_size;
    ptx::load_global_if(page_, pool.table + row_.sequence * pool.table_stride + page, entry_ >= 0);
  }

  // Its scales, under way.
  __device__ __forceinline__ void find_key(int batch) {
    key_ = {absent(), uint2{0, 0}};
    if (slot_ < 0) return;
    const bool window = key_of(batch) < row_.window_keys;
    const Pool& pool = window ? sources_.window_pool : sources_.compressed_pool;
    const uint8_t* const page = pool.data + page_ * pool.page_stride;
    key_.data = page + static_cast<int64_t>(slot_) * kEntryBytes;
    key_.scales = ptx::load_global_8(page + static_cast<int64_t>(pool.page_size) * kEntryBytes + slot_ * kScaleBytes);
  }

  const KeySources& sources_;
  const RowKeys& row_;
  uint32_t found_;
  int warp_;
  int entry_;         // of the batch after the next but one
  int slot_, page_;   // of the batch after the next
  FoundKey key_;      // of the next batch
  uint32_t present_;  // of the batch
};

}  // namespace dsv4::wide

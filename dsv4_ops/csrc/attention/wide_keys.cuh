// Where the keys of a producing warp of sparse_attention_wide.cu lie.
//
// Keys are looked up a few tiles at a time, a batch, a lane for each key, in three steps that depend on each other: the
// index of its entry, the page, the scales. Each has the time of a batch, and those of the next row follow without a
// pause. What is found goes through shared memory to the four lanes that load the key.
#pragma once

#include "attention/keys.cuh"
#include "attention/wide_tiles.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace dsv4::wide {

constexpr int kBatch = kWarp / kWarpKeys;  // tiles

// What an absent key has instead of an entry: zeros, with which products are harmless.
__device__ const uint4 absent_key[kEntryBytes / 16] = {};

// The rows of a CTA, one after the other, with the position of the next one under way.
class Rows {
 public:
  __device__ __forceinline__ explicit Rows(const SparseAttention& attention)
      : attention_(attention), head_tiles_((attention.heads + kHeads - 1) / kHeads), next_(blockIdx.x) {
    position_ = position();
  }

  // To the first row, then to the next one; false after the last.
  __device__ __forceinline__ bool advance(RowKeys& row) {
    if (next_ >= work()) return false;
    row = keys_of_row(attention_.keys, attention_.rope, next_ / head_tiles_, position_);
    next_ += gridDim.x;
    position_ = position();
    return true;
  }

 private:
  __device__ __forceinline__ uint32_t work() const { return static_cast<uint32_t>(attention_.rows) * head_tiles_; }
  __device__ __forceinline__ int position() const {
    return *position_of(attention_.rope, min(next_, work() - 1) / head_tiles_);
  }

  const SparseAttention& attention_;
  uint32_t head_tiles_, next_;
  int position_;
};

class KeyFinder {
 public:
  // For producing warp number `warp`, which has `found` for itself.
  __device__ __forceinline__ KeyFinder(const SparseAttention& attention, FoundKey (&found)[kWarp], int warp)
      : sources_(attention.keys), rows_(attention), found_(ptx::shared_address(found)), first_key_(warp * kWarpKeys) {
    find_entry();
    find_page();
    find_entry();
    find_key();
    find_page();
    find_entry();
  }

  // To the first batch, then to the next one of the row, or the first of the next row with keys. By all lanes.
  __device__ __forceinline__ void advance() {
    const auto data = reinterpret_cast<uint64_t>(key_.data);
    present_ = __ballot_sync(kAllLanes, key_.data != absent());  // all lanes have read the batch before
    ptx::store_shared(found_ + threadIdx.x % kWarp * sizeof(FoundKey),
                      uint4{static_cast<uint32_t>(data), static_cast<uint32_t>(data >> 32), key_.scales.x,
                            key_.scales.y});
    find_key();
    find_page();
    find_entry();
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
  __device__ __forceinline__ const Pool& pool(bool window) const {
    return window ? sources_.window_pool : sources_.compressed_pool;
  }

  // The entry of this lane's key of one more batch, as entry_of_key finds it; under way if it is an index.
  __device__ __forceinline__ void find_entry() {
    while (unit_ >= units_) {
      unit_ = 0;
      const bool more = rows_.advance(row_);
      units_ = more ? units_of_row(row_) : kBatch;
      if (!more) row_.count = 0;
    }
    const int lane = threadIdx.x % kWarp;
    const int key = (unit_ + lane / kWarpKeys) * kUnit + first_key_ + lane % kWarpKeys;
    const int place = key - row_.window_keys, ring = ring_entries(sources_);
    const bool exists = key < row_.count;
    unit_ += kBatch;
    of_window_ = place < 0;
    int entry = of_window_ ? row_.first_entry + key : place;
    if (of_window_ && entry >= ring) entry -= ring;
    entry_ = exists ? entry : kNoEntry;
    table_ = pool(of_window_).table + row_.sequence * pool(of_window_).table_stride;
    ptx::load_global_if(entry_, row_.indices + place, exists && !of_window_ && row_.indices != nullptr);
  }

  // Its page, under way.
  __device__ __forceinline__ void find_page() {
    const int page = divide(max(entry_, 0), of_window_ ? sources_.window_page : sources_.compressed_page);
    slot_ = entry_ < 0 ? kNoEntry : entry_ - page * pool(of_window_).page_size;
    in_window_ = of_window_;
    ptx::load_global_if(page_, table_ + page, entry_ >= 0);
  }

  // Its scales, under way.
  __device__ __forceinline__ void find_key() {
    key_ = {absent(), uint2{0, 0}};
    if (slot_ < 0) return;
    const Pool& of = pool(in_window_);
    const uint8_t* const page = of.data + page_ * of.page_stride;
    key_.data = page + static_cast<int64_t>(slot_) * kEntryBytes;
    key_.scales = ptx::load_global_8(page + static_cast<int64_t>(of.page_size) * kEntryBytes + slot_ * kScaleBytes);
  }

  const KeySources& sources_;
  Rows rows_;
  RowKeys row_;
  int units_ = 0, unit_ = 0;  // of the row, and the first that is not looked up
  uint32_t found_;
  int first_key_;
  // Of the batch after the next but one, of the one after the next, and of the next.
  int entry_;
  bool of_window_;
  const int32_t* table_;
  int slot_, page_ = 0;
  bool in_window_;
  FoundKey key_;
  uint32_t present_ = 0;  // of the batch
};

}  // namespace dsv4::wide

// Where the keys of a producing warp of sparse_attention_wide.cu lie.
//
// Keys are looked up for four tiles at a time, a batch, a lane for each key, in three steps that depend on each other:
// the index of its entry, the page, the scales. Each of the first two has the time of a batch, and those of the next
// row follow without a pause. All that is looked up is copied to shared memory: loads would take registers, and
// scoreboards that the loads of codes need.
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
  // For producing warp number `warp`, whose keys go through `keys`.
  __device__ __forceinline__ KeyFinder(const SparseAttention& attention, WarpKeys& keys, int warp)
      : sources_(attention.keys), rows_(attention), keys_(keys), warp_(warp) {
    find_entries();
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    find_pages();
    find_entries();
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  }

  // To the first batch, then to the next one, of 0 units if there is none. By all lanes, when what the call before
  // asked for has arrived. Scales come with one more group of copies.
  __device__ __forceinline__ void advance() {
    units_ = of_pages_.units;
    __syncwarp();  // all have read the batch before
    find_keys();
    find_pages();
    find_entries();
    ptx::cp_async_commit();
    __syncwarp();
  }

  __device__ __forceinline__ int units() const { return units_; }

  // Of key number `key` of this warp in tile number `tile` of the batch.
  __device__ __forceinline__ const uint8_t* data(int tile, int key) const {
    const uint2 words = ptx::load_shared_8(ptx::shared_address(&keys_.found[tile * kWarpKeys + key].data));
    return reinterpret_cast<const uint8_t*>(static_cast<uint64_t>(words.y) << 32 | words.x);
  }
  __device__ __forceinline__ uint2 scales(int tile, int key) const {
    return ptx::load_shared_8(ptx::shared_address(&keys_.found[tile * kWarpKeys + key].scales));
  }
  // A bit for each of its keys that is there.
  __device__ __forceinline__ uint8_t present(int tile) const { return present_ >> tile * kWarpKeys; }

 private:
  // Keys of tiles of one row.
  struct Batch {
    int units = 0;
    int first_key;
    int window_keys;   // of the row
    int64_t sequence;  // of the row
  };

  // Whether this lane's key of a batch is of the window.
  __device__ __forceinline__ bool is_of_window(const Batch& batch) const {
    return key_of(batch) < batch.window_keys;
  }
  __device__ __forceinline__ int key_of(const Batch& batch) const {
    const int lane = threadIdx.x % kWarp;
    return batch.first_key + lane / kWarpKeys * kUnit + warp_ * kWarpKeys + lane % kWarpKeys;
  }
  __device__ __forceinline__ const Pool& pool(bool window) const {
    return window ? sources_.window_pool : sources_.compressed_pool;
  }

  // Entries of one more batch, as entry_of_key finds them; indices are under way.
  __device__ __forceinline__ void find_entries() {
    while (row_units_ == 0 && rows_.advance(row_)) {
      row_units_ = units_of_row(row_);
      next_key_ = 0;
    }
    of_entries_ = {min(row_units_, kBatch), next_key_, row_.window_keys, row_.sequence};
    row_units_ -= of_entries_.units;
    next_key_ += kBatch * kUnit;
    const int key = key_of(of_entries_), place = key - row_.window_keys, ring = ring_entries(sources_);
    const bool exists = key < row_.count && of_entries_.units > 0;
    int32_t* const to = &keys_.entries[threadIdx.x % kWarp];
    if (exists && place >= 0 && row_.indices != nullptr) {
      ptx::cp_async_4(to, row_.indices + place, 4);
      return;
    }
    int entry = place;
    if (place < 0) {
      entry = row_.first_entry + key;
      entry -= entry < ring ? 0 : ring;
    }
    *to = exists ? entry : kNoEntry;
  }

  // Pages of the batch whose entries have arrived, under way.
  __device__ __forceinline__ void find_pages() {
    of_pages_ = of_entries_;
    const int lane = threadIdx.x % kWarp, entry = keys_.entries[lane];
    const bool window = is_of_window(of_pages_);
    const Pool& from = pool(window);
    const int page = divide(max(entry, 0), window ? sources_.window_page : sources_.compressed_page);
    slot_ = entry < 0 ? kNoEntry : entry - page * from.page_size;
    if (entry >= 0) ptx::cp_async_4(&keys_.pages[lane], from.table + of_pages_.sequence * from.table_stride + page, 4);
  }

  // Where the keys lie whose pages have arrived; scales are under way.
  __device__ __forceinline__ void find_keys() {
    const int lane = threadIdx.x % kWarp;
    FoundKey& to = keys_.found[lane];
    present_ = __ballot_sync(kAllLanes, slot_ >= 0);
    if (slot_ < 0) {
      to = {reinterpret_cast<const uint8_t*>(absent_key), uint2{0, 0}};
      return;
    }
    const Pool& from = pool(is_of_window(of_pages_));
    const uint8_t* const page = from.data + keys_.pages[lane] * from.page_stride;
    to.data = page + static_cast<int64_t>(slot_) * kEntryBytes;
    ptx::cp_async_8(&to.scales, page + static_cast<int64_t>(from.page_size) * kEntryBytes + slot_ * kScaleBytes);
  }

  const KeySources& sources_;
  Rows rows_;
  RowKeys row_ = {};
  WarpKeys& keys_;
  int warp_;
  int row_units_ = 0, next_key_ = 0;  // of the row: units that are not looked up, and the first key of those
  Batch of_entries_, of_pages_;
  int slot_;          // of this lane's key in the page that is under way; negative: absent
  int units_;         // of the batch
  uint32_t present_;  // of the batch
};

}  // namespace dsv4::wide

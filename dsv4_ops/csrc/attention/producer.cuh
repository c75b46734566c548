// The producing warps: keys of paged pools, gathered, unpacked and written to tiles in shared memory.
//
// A warp takes blocks of 8 keys: lane l has key l / 4, and of every group of 64 dimensions the quarter l % 4. So a load
// of the warp reads 64 bytes in a row of each key, and the eight lanes that L1 serves at a time read from two keys.
// Lanes the other way round read from eight: then a load takes 25 cycles of L1's data pipe (measured on an H200), more
// in all than all else that a unit asks of it. Eight lanes of a store have the even chunks of one key and the odd ones
// of the next: all banks.
//
// A line of L1 has two such rows, so it has to stay for the second one, and then to go: H100, 2026-11-25, us of 128
// rows of 16 heads and 640 keys by L1::evict_first 26.0, by plain loads 27.3, by L1::no_allocate 30.9; with no load at
// all 17.2.
//
// A warp has 4.5 KB under way all the time, and waits once a block, for loads as old as it takes to unpack one. ptxas
// has one scoreboard for all loads whose use is not in the same basic block, so a wait for one of them is a wait for
// the newest. Hence a block is waited for, then the next one is loaded, into registers of its own, then the first one
// is unpacked. No thread here passes a fence.proxy.async, which waits for its loads too: who waits for a tile does,
// before wgmma reads it. Keys are looked up 32 at a time, a lane for each, for four blocks: their indices two batches
// ahead, their pages one batch ahead. A value is loaded into the register that it is used from: a copy would wait for
// it.
#pragma once

#include <climits>

#include "attention/keys.cuh"
#include "attention/tile.cuh"
#include "common/ptx.cuh"
#include "common/ptx_sm90.cuh"
#include "common/ptx_sm90_attention.cuh"
#include "common/reduce.cuh"

namespace dsv4 {

constexpr int kBlock = 8;   // keys of a warp at a time
constexpr int kTileBytes = kUnit * kDim * 2;
constexpr int kSlabBytes = kUnit * kRowBytes;
constexpr int kLoads = kNope / 64 + 2;  // of 16 bytes that a thread does for a key

// Tiles in shared memory, and how producers and consumers hand them over. Every thread that wrote or read one arrives
// itself: racecheck does not follow a lane that arrives for its warp.
template <int kCount>
struct StagedTiles {
  alignas(1024) uint8_t keys[kCount * kTileBytes];
  alignas(8) uint64_t full[kCount];      // mbarriers: the tile is written
  uint64_t empty[kCount];                // the tile has been used
  alignas(8) uint8_t valid[kCount * 8];  // a bit for each key
};

struct Tiles {
  uint8_t* keys;
  uint8_t* valid;
  uint32_t full;
  uint32_t empty;

  __device__ __forceinline__ uint32_t full_barrier(int stage) const { return full + 8 * stage; }
  __device__ __forceinline__ uint32_t empty_barrier(int stage) const { return empty + 8 * stage; }
};

// By all threads of the CTA, first of all. A tile is free again after so many arrivals.
template <int kCount>
__device__ __forceinline__ Tiles start_tiles(StagedTiles<kCount>& memory, int producer_warps, int consumer_arrivals) {
  const Tiles tiles{memory.keys, memory.valid, ptx::shared_address(memory.full), ptx::shared_address(memory.empty)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kCount; ++stage) {
      ptx::mbarrier_init(tiles.full_barrier(stage), producer_warps * kWarp);
      ptx::mbarrier_init(tiles.empty_barrier(stage), consumer_arrivals);
    }
  }
  __syncthreads();
  return tiles;
}

// What an absent key has instead of an entry: zeros, with which products are harmless.
__device__ const uint4 absent_key[kEntryBytes / 16] = {};

// The entry of a key as entry_of_key finds it, or where that is to be loaded from.
struct SoughtEntry {
  int entry;
  const int32_t* index;
  bool is_index;

  __device__ __forceinline__ SoughtEntry(const KeySources& sources, const RowKeys& row, int key) {
    const int place = key - row.window_keys, ring = ring_entries(sources);
    const bool exists = key < row.count, window = place < 0;
    entry = window ? row.first_entry + key : place;
    if (window && entry >= ring) entry -= ring;
    if (!exists) entry = kNoEntry;
    index = row.indices + place;
    is_index = exists && !window && row.indices != nullptr;
  }
};

// Where the bytes of a key lie.
struct KeyPlace {
  const uint8_t* data;
  const uint8_t* scales;
};

// A key that a lane looks up: its entry and, once that is loaded, its page.
struct Lookup {
  int key;
  int entry;  // negative: absent
  int32_t page = 0;

  // Under way from here on.
  __device__ __forceinline__ void find_page(const KeySources& sources, const RowKeys& row) {
    const bool window = key < row.window_keys;
    const Pool& pool = window ? sources.window_pool : sources.compressed_pool;
    const int place = divide(max(entry, 0), window ? sources.window_page : sources.compressed_page);
    ptx::load_global_if(page, pool.table + row.sequence * pool.table_stride + place, entry >= 0);
  }

  // Without a branch, so that the wait for the page is over whatever the lane has: ptxas would have others wait again.
  __device__ __forceinline__ KeyPlace place(const KeySources& sources, const RowKeys& row) const {
    const auto* const absent = reinterpret_cast<const uint8_t*>(absent_key);
    const bool window = key < row.window_keys, exists = entry >= 0;
    const Pool& pool = window ? sources.window_pool : sources.compressed_pool;
    const PageDivisor divisor = window ? sources.window_page : sources.compressed_page;
    const int slot = entry - divide(max(entry, 0), divisor) * pool.page_size;
    const uint8_t* const start = pool.data + page * pool.page_stride;
    const uint8_t* const scales = start + static_cast<int64_t>(pool.page_size) * kEntryBytes + slot * kScaleBytes;
    return {exists ? start + static_cast<int64_t>(slot) * kEntryBytes : absent, exists ? scales : absent};
  }
};

template <typename T>
__device__ __forceinline__ const T* from_lane(const T* pointer, int lane) {
  return reinterpret_cast<const T*>(__shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(pointer), lane));
}

// Load number `load` of a key: this lane's quarter of a group of E4M3 codes, or half of its quarter of the rope
// dimensions.
__device__ __forceinline__ uint4 load_part(const KeyPlace& key, int load, int quarter) {
  constexpr int kGroups = kNope / 64;
  const uint8_t* const codes = key.data + quarter * 16;
  const uint8_t* const rope = key.data + kNope + quarter * 32;
  return ptx::load_shared_line(load < kGroups ? codes + load * 64 : rope + (load - kGroups) * 16);
}

// Whether a group has a scale above kLargestScale, and the scales up to that: the first factors.
__device__ __forceinline__ bool large_scales(uint2 scales) {
  return (large_scales(scales.x) | large_scales(scales.y & 0xFFFFFFu)) != 0;  // seven groups
}

__device__ __forceinline__ uint2 smaller_scales(uint2 scales) {
  return {__vminu4(scales.x, kLargestScale * 0x01010101u), __vminu4(scales.y, kLargestScale * 0x01010101u)};
}

// The second factor, for the chunks of a lane at `chunk` and next to it, once they are written.
__device__ __forceinline__ void multiply_again(uint2 scales, uint32_t chunk) {
  for (int slab = 0; slab < kSlabs - 1; ++slab) {
    const uint32_t byte = (slab < 4 ? scales.x : scales.y) >> slab % 4 * 8 & 0xFF;
    if (byte <= kLargestScale) continue;
    for (const uint32_t at : {chunk, chunk ^ 16}) {
      uint4 values = ptx::load_shared(at + slab * kSlabBytes);
      multiply_chunk(values, second_factor(byte));
      ptx::store_shared(at + slab * kSlabBytes, values);
    }
  }
}

// The keys of a producing warp, 32 at a time: those of four blocks, of units first, first + step, .. below `last`.
template <int kWarps>
struct WarpKeys {
  static constexpr int kBlocks = kUnit / (kWarps * kBlock);  // of a warp in a tile
  static constexpr int kBatch = kWarp / kBlock;              // blocks whose keys are looked up together
  int first, step, blocks, warp;

  __device__ __forceinline__ WarpKeys(int first, int last, int step, int warp)
      : first(first), step(step), blocks((last - first + step - 1) / step * kBlocks), warp(warp) {}

  // The key that this lane looks up for a batch, or one that no row has.
  __device__ __forceinline__ int key(int batch) const {
    const int lane = threadIdx.x % kWarp, block = batch * kBatch + lane / kBlock;
    const int part = block % kBlocks * kWarps + warp;
    return block < blocks ? (first + block / kBlocks * step) * kUnit + part * kBlock + lane % kBlock : INT_MAX;
  }
};

// Entries of two batches of keys, each in a register of its own from the load to its use.
struct Entries {
  int32_t even = kNoEntry, odd = kNoEntry;  // of batches

  // Under way from here on.
  __device__ __forceinline__ void find(const SoughtEntry& sought, int batch) {
    const bool is_odd = batch % 2 != 0;
    even = is_odd ? even : sought.entry;
    odd = is_odd ? sought.entry : odd;
    ptx::load_global_if(even, sought.index, sought.is_index && !is_odd);
    ptx::load_global_if(odd, sought.index, sought.is_index && is_odd);
  }
  __device__ __forceinline__ int of(int batch) const { return batch % 2 != 0 ? odd : even; }
};

// The lookups of a warp: a batch with its pages, and the entries of the batch after it.
struct Lookups {
  Lookup upcoming;
  Entries entries;

  template <int kWarps>
  __device__ __forceinline__ Lookups(const KeySources& sources, const RowKeys& row, const WarpKeys<kWarps>& keys) {
    find_entries(sources, row, keys, 0);
    find_entries(sources, row, keys, 1);
    find_pages(sources, row, keys, 0);
  }

  template <int kWarps>
  __device__ __forceinline__ void find_entries(const KeySources& sources, const RowKeys& row,
                                               const WarpKeys<kWarps>& keys, int batch) {
    entries.find(SoughtEntry(sources, row, keys.key(batch)), batch);
  }

  template <int kWarps>
  __device__ __forceinline__ void find_pages(const KeySources& sources, const RowKeys& row,
                                             const WarpKeys<kWarps>& keys, int batch) {
    upcoming = {keys.key(batch), entries.of(batch)};
    upcoming.find_page(sources, row);
  }
};

// Eight keys of a warp on their way to shared memory.
struct KeyBlock {
  uint4 parts[kLoads];
  uint2 scales;
  uint32_t valid;  // a bit for each key
};

// Write the units of a warp's keys one after the other to stages 0, 1, .. and again 0.
template <int kWarps, int kCount>
__device__ __forceinline__ void produce(const KeySources& sources, const RowKeys& row, const Tiles& tiles,
                                        const WarpKeys<kWarps>& own, Lookups lookups) {
  static_assert(WarpKeys<kWarps>::kBlocks == 1, "a warp has one block of a unit");
  constexpr int kBatch = WarpKeys<kWarps>::kBatch;
  const int lane = threadIdx.x % kWarp, column = lane / 4, quarter = lane % 4, units = own.blocks;
  KeyPlace ready{};
  uint32_t present = 0;  // of the keys in `ready`
  const auto load = [&](int unit, KeyBlock& block, bool may_start_batch) {
    const int place = unit % kBatch * kBlock;
    if (may_start_batch && place == 0) {
      ready = lookups.upcoming.place(sources, row);
      present = __ballot_sync(kAllLanes, lookups.upcoming.entry >= 0);
      lookups.find_pages(sources, row, own, unit / kBatch + 1);
      lookups.find_entries(sources, row, own, unit / kBatch + 2);
    }
    const KeyPlace key{from_lane(ready.data, place + column), from_lane(ready.scales, place + column)};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) block.parts[i] = load_part(key, i, quarter);
    block.scales = ptx::load_global_8(key.scales);
    block.valid = present >> place & 0xFF;
    __syncwarp();  // keeps ptxas from moving the loads to where they are used
  };
  const int key = own.warp * kBlock + column;
  const uint32_t first_chunk = ptx::shared_address(tiles.keys) + chunk_offset(key, 2 * quarter);
  const auto write = [&](int unit, const KeyBlock& block, uint2 scales) {
    const int stage = unit % kCount, use = unit / kCount;
    if (use > 0) ptx::mbarrier_wait(tiles.empty_barrier(stage), (use - 1) & 1);
    if (lane == 0) tiles.valid[stage * 8 + own.warp] = static_cast<uint8_t>(block.valid);
    const uint32_t chunk = first_chunk + stage * kTileBytes;
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      uint4 a, b;
      if (slab < kSlabs - 1) {
        const uint32_t byte = __byte_perm(scales.x, scales.y, 0x4440 + slab) & 0xFF;
        unpack_e4m3(block.parts[slab], first_factor(byte), a, b);
      } else {
        a = block.parts[kLoads - 2];
        b = block.parts[kLoads - 1];
        split_pairs(a, b);
      }
      ptx::store_shared(chunk + slab * kSlabBytes, a);
      ptx::store_shared((chunk ^ 16) + slab * kSlabBytes, b);
    }
    if (large_scales(block.scales)) multiply_again(block.scales, chunk);
    ptx::mbarrier_arrive(tiles.full_barrier(stage));
  };
  // The scales are used, that is the wait for `block`, before anything is loaded behind it.
  const auto next_unit = [&](int unit, const KeyBlock& block, KeyBlock& next, bool may_start_batch) {
    uint2 scales = block.scales;
    if (__any_sync(kAllLanes, large_scales(scales))) scales = smaller_scales(scales);
    if (unit + 1 < units) load(unit + 1, next, may_start_batch);
    write(unit, block, scales);
  };

  KeyBlock even, odd;
  load(0, even, true);
  for (int unit = 0; unit < units; unit += 2) {
    next_unit(unit, even, odd, false);
    if (unit + 1 == units) break;
    next_unit(unit + 1, odd, even, true);
  }
}

}  // namespace dsv4

// The producing warps: keys of paged pools, gathered, unpacked and written to tiles in shared memory.
//
// A warp takes blocks of 8 keys: lane l has key l / 4, and of every group of 64 dimensions the quarter l % 4. So a load
// of the warp reads 64 bytes in a row of each key, and the eight lanes that L1 serves at a time read from two keys.
// Lanes the other way round read from eight: then a load takes 25 cycles of L1's data pipe (measured on an H200), more
// in all than all else that a unit asks of it. Eight lanes of a store have the even chunks of one key and the odd ones
// of the next: all banks.
//
// All of a block is loaded before the block in front of it is unpacked, into registers of its own: a warp has 4.5 KB
// under way all the time, and what is under way where a tile is handed over has been so for as long as it takes to
// unpack a block. That matters since fence.proxy.async waits for the loads of its thread. Keys are looked up 32 at a
// time, a lane for each, for four blocks: their indices two batches ahead, their pages one batch ahead.
#pragma once

#include "attention/keys.cuh"
#include "attention/tile.cuh"
#include "common/ptx.cuh"
#include "common/ptx_sm90.cuh"
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

// A key that a lane looks up: its entry and, once that is loaded, its page.
struct Lookup {
  int key;
  int entry;  // negative: absent
  int32_t page;
};

// Where the bytes of a key lie.
struct KeyPlace {
  const uint8_t* data;
  const uint8_t* scales;
};

__device__ __forceinline__ const int32_t* page_of(const KeySources& sources, const RowKeys& row, const Lookup& lookup) {
  const bool window = lookup.key < row.window_keys;
  const Pool& pool = window ? sources.window_pool : sources.compressed_pool;
  return pool.table + row.sequence * pool.table_stride +
         divide(lookup.entry, window ? sources.window_page : sources.compressed_page);
}

__device__ __forceinline__ KeyPlace place_of(const KeySources& sources, const RowKeys& row, const Lookup& lookup) {
  const auto* const absent = reinterpret_cast<const uint8_t*>(absent_key);
  if (lookup.entry < 0) return {absent, absent};
  const bool window = lookup.key < row.window_keys;
  const Pool& pool = window ? sources.window_pool : sources.compressed_pool;
  const PageDivisor divisor = window ? sources.window_page : sources.compressed_page;
  const int slot = lookup.entry - divide(lookup.entry, divisor) * pool.page_size;
  const uint8_t* const page = pool.data + lookup.page * pool.page_stride;
  return {page + static_cast<int64_t>(slot) * kEntryBytes,
          page + static_cast<int64_t>(pool.page_size) * kEntryBytes + slot * kScaleBytes};
}

template <typename T>
__device__ __forceinline__ const T* from_lane(const T* pointer, int lane) {
  return reinterpret_cast<const T*>(__shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(pointer), lane));
}

// Load number `load` of a key: this lane's quarter of a group of E4M3 codes, or half of its quarter of the rope
// dimensions.
__device__ __forceinline__ uint4 load_part(const KeyPlace& key, int load, int quarter) {
  constexpr int kGroups = kNope / 64;
  const uint8_t* const address = key.data + quarter * 16;
  return ptx::load_once(load < kGroups ? address + load * 64 : address + quarter * 16 + kNope + (load - kGroups) * 16);
}

// The chunks of a lane whose groups have scales above kLargestScale, once they are written: the second factor.
__device__ __forceinline__ void multiply_again(uint2 scales, uint8_t* first_chunk, uint8_t* second_chunk) {
  for (int slab = 0; slab < kSlabs - 1; ++slab) {
    const uint32_t byte = (slab < 4 ? scales.x : scales.y) >> slab % 4 * 8 & 0xFF;
    if (byte <= kLargestScale) continue;
    multiply_chunk(*reinterpret_cast<uint4*>(first_chunk + slab * kSlabBytes), second_factor(byte));
    multiply_chunk(*reinterpret_cast<uint4*>(second_chunk + slab * kSlabBytes), second_factor(byte));
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

  __device__ __forceinline__ Lookup find_entry(const KeySources& sources, const RowKeys& row, int batch) const {
    const int lane = threadIdx.x % kWarp, block = batch * kBatch + lane / kBlock;
    const int part = block % kBlocks * kWarps + warp;
    const int key = (first + block / kBlocks * step) * kUnit + part * kBlock + lane % kBlock;
    return Lookup{key, block < blocks ? entry_of_key(sources, row, key) : kNoEntry, 0};
  }
};

__device__ __forceinline__ void find_page(const KeySources& sources, const RowKeys& row, Lookup& lookup) {
  if (lookup.entry >= 0) lookup.page = *page_of(sources, row, lookup);
}

// The lookups of a warp's first two batches, the first with its pages.
struct FirstLookups {
  Lookup upcoming, later;

  template <int kWarps>
  __device__ __forceinline__ FirstLookups(const KeySources& sources, const RowKeys& row, const WarpKeys<kWarps>& keys)
      : upcoming(keys.find_entry(sources, row, 0)), later(keys.find_entry(sources, row, 1)) {
    find_page(sources, row, upcoming);
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
                                        const WarpKeys<kWarps>& own, const FirstLookups& lookups) {
  static_assert(WarpKeys<kWarps>::kBlocks == 1, "a warp has one block of a unit");
  constexpr int kBatch = WarpKeys<kWarps>::kBatch;
  const int lane = threadIdx.x % kWarp, column = lane / 4, quarter = lane % 4, units = own.blocks;
  Lookup upcoming = lookups.upcoming, later = lookups.later;
  KeyPlace ready{};
  uint32_t present = 0;  // of the keys in `ready`
  const auto load = [&](int unit, KeyBlock& block, bool may_start_batch) {
    const int place = unit % kBatch * kBlock;
    const bool starts_batch = may_start_batch && place == 0;
    if (starts_batch) {
      ready = place_of(sources, row, upcoming);
      present = __ballot_sync(kAllLanes, upcoming.entry >= 0);
    }
    const KeyPlace key{from_lane(ready.data, place + column), from_lane(ready.scales, place + column)};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) block.parts[i] = load_part(key, i, quarter);
    block.scales = *reinterpret_cast<const uint2*>(key.scales);
    block.valid = present >> place & 0xFF;
    if (starts_batch) {
      upcoming = later;
      find_page(sources, row, upcoming);
      later = own.find_entry(sources, row, unit / kBatch + 2);
    }
    __syncwarp();  // keeps ptxas from moving the loads to where they are used
  };
  const int key = own.warp * kBlock + column;
  const auto write = [&](int unit, const KeyBlock& block) {
    const int stage = unit % kCount, use = unit / kCount;
    const bool large =
        __any_sync(kAllLanes, (large_scales(block.scales.x) | large_scales(block.scales.y & 0xFFFFFFu)) != 0);
    uint2 scales = block.scales;
    if (large) {
      scales.x = __vminu4(scales.x, kLargestScale * 0x01010101u);
      scales.y = __vminu4(scales.y, kLargestScale * 0x01010101u);
    }
    if (use > 0) ptx::mbarrier_wait(tiles.empty_barrier(stage), (use - 1) & 1);
    uint8_t* const keys = tiles.keys + stage * kTileBytes;
    uint8_t* const first_chunk = keys + chunk_offset(key, 2 * quarter);
    uint8_t* const second_chunk = keys + chunk_offset(key, 2 * quarter + 1);
    if (lane == 0) tiles.valid[stage * 8 + own.warp] = static_cast<uint8_t>(block.valid);
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
      *reinterpret_cast<uint4*>(first_chunk + slab * kSlabBytes) = a;
      *reinterpret_cast<uint4*>(second_chunk + slab * kSlabBytes) = b;
    }
    if (large) multiply_again(block.scales, first_chunk, second_chunk);
    ptx::fence_async_proxy();
    ptx::mbarrier_arrive(tiles.full_barrier(stage));
  };

  KeyBlock even, odd;
  load(0, even, true);
  for (int unit = 0; unit < units; unit += 2) {
    if (unit + 1 < units) load(unit + 1, odd, false);
    write(unit, even);
    if (unit + 1 == units) break;
    if (unit + 2 < units) load(unit + 2, even, true);
    write(unit + 1, odd);
  }
}

}  // namespace dsv4

// The producing warps: keys of paged pools, gathered, unpacked and written to tiles in shared memory.
//
// A warp takes 8 keys at a time: lane l has key l % 8, and of every group of 64 dimensions the quarter l / 8, so that a
// load of the warp reads 64 bytes in a row of each key and a store fills all banks. While the quarters of one block of
// keys are unpacked, those of the next are loaded into the same registers, its place in the pool is looked up for the
// block after that, and the index for the one after: a warp has 4.5 KB under way all the time.
#pragma once

#include "attention/keys.cuh"
#include "attention/tile.cuh"
#include "common/ptx.cuh"
#include "common/ptx_sm90.cuh"
#include "common/reduce.cuh"

namespace dsv4 {

constexpr int kStages = 2;            // tiles in shared memory
constexpr int kBlock = 8;             // keys of a warp at a time
constexpr int kTileBytes = kUnit * kDim * 2;
constexpr int kSlabBytes = kUnit * kRowBytes;
constexpr int kLoads = kNope / 64 + 2;  // of 16 bytes that a thread does for a key

struct Tiles {
  uint8_t* keys;        // [kStages] tiles
  uint8_t* valid;       // [kStages][8]: a bit for each key
  uint32_t full;        // [kStages] mbarriers: the tile is written
  uint32_t empty;       // [kStages]: the tile has been used

  __device__ __forceinline__ uint32_t full_barrier(int stage) const { return full + 8 * stage; }
  __device__ __forceinline__ uint32_t empty_barrier(int stage) const { return empty + 8 * stage; }
};

// A key as a thread finds it.
struct KeyPlace {
  const uint8_t* data;    // of this thread's quarter of the first group; null: there is no such key
  const uint8_t* scales;
};

__device__ __forceinline__ KeyPlace find_key(const KeySources& sources, const RowKeys& row, int key, int entry,
                                             int quarter) {
  if (entry < 0) return {nullptr, nullptr};
  const bool window = key < row.window_keys;
  const Pool& pool = window ? sources.window_pool : sources.compressed_pool;
  const Divisor page_size = window ? sources.window_page : sources.compressed_page;
  const Place place = place_of_entry(pool, page_size, row.sequence, entry);
  const uint8_t* const scales = place.page + static_cast<int64_t>(pool.page_size) * kEntryBytes;
  return {place.page + place.slot * kEntryBytes + quarter * 16, scales + place.slot * kScaleBytes};
}

// Load number `load` of a key: a quarter of a group of E4M3 codes, or half of a quarter of the rope dimensions.
__device__ __forceinline__ uint4 load_part(const KeyPlace& key, int load, int quarter) {
  if (key.data == nullptr) return {0, 0, 0, 0};
  constexpr int kGroups = kNope / 64;
  const int offset = load < kGroups ? load * 64 : kNope + quarter * 16 + (load - kGroups) * 16;
  return ptx::load_once(key.data + offset);
}

__device__ __forceinline__ uint2 load_scales(const KeyPlace& key) {
  return key.data == nullptr ? uint2{0, 0} : *reinterpret_cast<const uint2*>(key.scales);
}

// Write tiles first .. last - 1 of a row's keys; tile t goes to stage (t - first) % kStages.
template <int kWarps>
__device__ __forceinline__ void produce(const KeySources& sources, const RowKeys& row, const Tiles& tiles, int first,
                                        int last, int warp) {
  constexpr int kBlocks = kUnit / (kWarps * kBlock);  // of a warp in a tile
  const int lane = threadIdx.x % kWarp, column = lane % kBlock, quarter = lane / kBlock;
  const int blocks = (last - first) * kBlocks;
  const auto key_of = [&](int block) {
    const int tile = first + block / kBlocks, part = block % kBlocks * kWarps + warp;
    return block < blocks ? tile * kUnit + part * kBlock + column : row.count;
  };
  const auto entry_of = [&](int block) { return entry_of_key(sources, row, key_of(block)); };
  const auto place_of = [&](int block, int entry) { return find_key(sources, row, key_of(block), entry, quarter); };

  const int entry_0 = entry_of(0), entry_1 = entry_of(1);
  int entry_after = entry_of(2);
  KeyPlace current = place_of(0, entry_0);
  KeyPlace next = place_of(1, entry_1);
  uint4 parts[kLoads];
#pragma unroll
  for (int load = 0; load < kLoads; ++load) parts[load] = load_part(current, load, quarter);
  uint2 scales = load_scales(current);
  bool valid = current.data != nullptr;

  for (int block = 0; block < blocks; ++block) {
    const int tile = block / kBlocks, stage = tile % kStages, part = block % kBlocks * kWarps + warp;
    const KeyPlace after = place_of(block + 2, entry_after);
    entry_after = entry_of(block + 3);
    const uint2 next_scales = load_scales(next);
    if (block % kBlocks == 0 && tile >= kStages) {
      ptx::mbarrier_wait(tiles.empty_barrier(stage), (tile / kStages - 1) & 1);
    }
    uint8_t* const keys = tiles.keys + stage * kTileBytes;
    const int key = part * kBlock + column;
    uint8_t* const first_chunk = keys + chunk_offset(key, 2 * quarter);
    uint8_t* const second_chunk = keys + chunk_offset(key, 2 * quarter + 1);
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      uint4 a, b;
      if (slab < kSlabs - 1) {
        const uint32_t byte = __byte_perm(scales.x, scales.y, 0x4440 + slab) & 0xFF;
        unpack_e4m3(parts[slab], GroupScale(byte), a, b);
        parts[slab] = load_part(next, slab, quarter);
      } else {
        a = parts[kLoads - 2];
        b = parts[kLoads - 1];
        parts[kLoads - 2] = load_part(next, kLoads - 2, quarter);
        parts[kLoads - 1] = load_part(next, kLoads - 1, quarter);
        split_pairs(a, b);
      }
      *reinterpret_cast<uint4*>(first_chunk + slab * kSlabBytes) = a;
      *reinterpret_cast<uint4*>(second_chunk + slab * kSlabBytes) = b;
    }
    const uint32_t lanes = __ballot_sync(kAllLanes, valid);
    if (lane == 0) tiles.valid[stage * 8 + part] = static_cast<uint8_t>(lanes);  // lanes 0 .. 7 have the eight keys
    ptx::fence_async_proxy();
    __syncwarp();
    if (lane == 0 && block % kBlocks == kBlocks - 1) ptx::mbarrier_arrive(tiles.full_barrier(stage));
    valid = next.data != nullptr;
    scales = next_scales;
    next = after;
  }
}

}  // namespace dsv4

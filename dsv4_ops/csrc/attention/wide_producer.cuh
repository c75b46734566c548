// The producing warps of sparse_attention_wide.cu: keys of paged pools, gathered, unpacked and written to tiles.
//
// A warp has one half of the dimensions and takes blocks of 8 keys: lane l has key l % 8, and of every group of 64
// dimensions the quarter l / 8, so that a load of the warp reads 64 bytes in a row of each key and a store fills all
// banks. As soon as a piece of a block is unpacked, the same piece of the next block is loaded into the registers: all
// warps together have 18 KB under way. Keys are looked up for two tiles at a time, a lane for each of the warp's keys:
// their indices two batches ahead, their pages one batch ahead.
#pragma once

#include "attention/keys.cuh"
#include "attention/wide_tiles.cuh"
#include "common/number_formats.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace dsv4::wide {

constexpr int kWarpKeys = kUnit / (kProducerWarps / 2);  // of a warp in a tile
constexpr int kBlock = kWarpKeys / 2;                    // of a warp at a time
constexpr int kLaneKeys = kBlock / 8;                    // of a lane
constexpr int kBlocks = kWarpKeys / kBlock;              // of a warp in a tile
constexpr int kBatch = kWarp / kWarpKeys;                // tiles whose keys are looked up together

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

__device__ __forceinline__ void find_page(const KeySources& sources, const RowKeys& row, Lookup& lookup) {
  if (lookup.entry < 0) return;
  const bool window = lookup.key < row.window_keys;
  const Pool& pool = window ? sources.window_pool : sources.compressed_pool;
  lookup.page = pool.table[row.sequence * pool.table_stride +
                           divide(lookup.entry, window ? sources.window_page : sources.compressed_page)];
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

// A lane's share of one key: where its half lies and what is loaded of it.
template <int kHalf>
struct Share {
  const uint8_t* data;
  uint4 parts[kHalfSlabs + kHalf];
  uint32_t scales;  // a byte for each group of the half

  __device__ __forceinline__ void aim(const KeyPlace& places, int lane, int quarter) {
    data = from_lane(places.data, lane) + kHalf * (kDim / 2) + quarter * 16;
    scales = ptx::load_global(from_lane(places.scales, lane) + kHalf * 4);
  }

  // What becomes a slab: 16 codes, or 16 rope dimensions.
  __device__ __forceinline__ void load(int slab, int quarter) {
    if (kHalf == 0 || slab < kHalfSlabs - 1) {
      parts[slab] = ptx::load_once(data + slab * 64);
    } else {
      const uint8_t* const rope = data + slab * 64 + quarter * 16;
      parts[slab] = ptx::load_once(rope);
      parts[slab + kHalf] = ptx::load_once(rope + 16);
    }
  }

  // The same as two chunks of bf16; the byte of each group in `factors` is at most kLargestScale.
  __device__ __forceinline__ void unpack(int slab, uint32_t bytes, uint4& first, uint4& second) const {
    if (kHalf == 0 || slab < kHalfSlabs - 1) {
      unpack_e4m3(parts[slab], first_factor(__byte_perm(bytes, 0, 0x4440 + slab)), first, second);
    } else {
      first = parts[slab];
      second = parts[slab + kHalf];
      split_pairs(first, second);
    }
  }
};

// The second factor of groups with scales above kLargestScale, for the chunks at two addresses of every slab.
template <int kHalf>
__device__ __forceinline__ void multiply_again(uint32_t scales, uint32_t address) {
  for (int slab = 0; slab < kHalfSlabs - kHalf; ++slab) {
    const uint32_t byte = scales >> slab * 8 & 0xFF;
    if (byte <= kLargestScale) continue;
    for (const uint32_t at : {address, address ^ 16}) {
      uint4 chunk = ptx::load_shared(at + slab * kSlabBytes);
      multiply_chunk(chunk, second_factor(byte));
      ptx::store_shared(at + slab * kSlabBytes, chunk);
    }
  }
}

__device__ __forceinline__ void store_valid(uint32_t address, uint32_t bits) {
  if constexpr (kWarpKeys == 32) {
    ptx::store_shared(address, bits);
  } else {
    ptx::store_shared(address, static_cast<uint16_t>(bits));
  }
}

// Take back half kHalf of a stage where it was handed over: bit `stage` of `handed_over`.
template <int kHalf>
__device__ __forceinline__ void take_back(int stage, uint32_t& handed_over) {
  if (handed_over >> stage & 1) ptx::named_barrier(empty_barrier(stage, kHalf), kHandOverThreads);
  handed_over &= ~(1u << stage);
}

// Write the tiles of a row: half kHalf, and of the half's warps number `pair`.
template <int kHalf, typename Memory>
__device__ __forceinline__ void produce(const KeySources& sources, const RowKeys& row, const Memory& memory, int pair,
                                        uint32_t& handed_over) {
  const int lane = threadIdx.x % kWarp, column = lane % 8, quarter = lane / 8;
  const int units = (row.count + kUnit - 1) / kUnit;
  if (units == 0) return;
  constexpr int kBlockBytes = kBlock * kRowBytes;
  const uint32_t tiles = ptx::shared_address(memory.keys) + kHalf * kHalfSlabs * kSlabBytes +
                         pair * kBlocks * kBlockBytes + chunk_offset(column, 2 * quarter);
  const uint32_t valid = ptx::shared_address(memory.valid) + pair * (kWarpKeys / 8);
  uint32_t codes = 0, code_scales = 0;  // of this lane's first key
  if constexpr (Memory::kCodes) {
    const int key = pair * kWarpKeys + column;
    codes = ptx::shared_address(memory.codes) + kHalf * kHalfSlabs * kGroupBytes + code_offset(key, quarter);
    code_scales = ptx::shared_address(memory.scales) + ((kHalf * kHalfSlabs + quarter) * kUnit + key) * 4;
  }

  const auto find_entry = [&](int batch) {
    const int key = (batch * kBatch + lane / kWarpKeys) * kUnit + pair * kWarpKeys + lane % kWarpKeys;
    return Lookup{key, entry_of_key(sources, row, key), 0};
  };
  Lookup upcoming = find_entry(0), later = find_entry(1);
  find_page(sources, row, upcoming);
  KeyPlace ready = place_of(sources, row, upcoming);
  uint32_t present = __ballot_sync(kAllLanes, upcoming.entry >= 0);  // of the keys in `ready`
  upcoming = later;
  find_page(sources, row, upcoming);
  later = find_entry(2);

  Share<kHalf> shares[kLaneKeys];
#pragma unroll
  for (int i = 0; i < kLaneKeys; ++i) {
    shares[i].aim(ready, i * 8 + column, quarter);
#pragma unroll
    for (int slab = 0; slab < kHalfSlabs; ++slab) shares[i].load(slab, quarter);
  }

  for (int block = 0; block < units * kBlocks; ++block) {
    const int unit = block / kBlocks, inside = block % kBlocks, stage = unit % kStages;
    const int following = (block + 1) % (kBatch * kBlocks);
    const uint32_t present_now = present;
    if (following == 0) {
      ready = place_of(sources, row, upcoming);
      present = __ballot_sync(kAllLanes, upcoming.entry >= 0);
      upcoming = later;
      find_page(sources, row, upcoming);
      later = find_entry(unit / kBatch + 3);
    }
    constexpr uint32_t kUsedBytes = kHalf == 0 ? ~0u : 0xFFFFFFu;
    uint32_t scales[kLaneKeys], all_scales[kLaneKeys], large_bits = 0;
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      scales[i] = all_scales[i] = shares[i].scales;
      large_bits |= large_scales(scales[i] & kUsedBytes);
      shares[i].aim(ready, following * kBlock + i * 8 + column, quarter);
    }
    const bool large = __any_sync(kAllLanes, large_bits != 0);
    if (large) {
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) scales[i] = __vminu4(scales[i], kLargestScale * 0x01010101u);
    }
    if (inside == 0) {
      take_back<kHalf>(stage, handed_over);
      if (kHalf == 0 && lane == 0) store_valid(valid + 8 * stage, present_now >> unit % kBatch * kWarpKeys);
    }
    const uint32_t address = tiles + stage * kTileBytes + inside * kBlockBytes;
    if constexpr (Memory::kCodes) {
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) {
        const int key = inside * kBlock + i * 8;
        const float scale = decode_ue8m0(all_scales[i] >> 8 * quarter & 0xFF);
        if (quarter < kHalfSlabs - kHalf) {
          ptx::store_shared(code_scales + (stage * kGroups * kUnit + key) * 4, __float_as_uint(scale));
        }
      }
    }
#pragma unroll
    for (int slab = 0; slab < kHalfSlabs; ++slab) {
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) {
        uint4 first, second;
        shares[i].unpack(slab, scales[i], first, second);
        if constexpr (Memory::kCodes) {
          if (slab < kHalfSlabs - kHalf) {
            const int key = inside * kBlock + i * 8;
            ptx::store_shared(codes + (stage * kGroups + slab) * kGroupBytes + key * 64, shares[i].parts[slab]);
          }
        }
        shares[i].load(slab, quarter);
        const int offset = slab * kSlabBytes + i * 8 * kRowBytes;
        ptx::store_shared(address + offset, first);
        ptx::store_shared((address ^ 16) + offset, second);
      }
      __syncwarp();  // keeps ptxas from moving the loads to the end of the loop
    }
    if (large) {
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i) multiply_again<kHalf>(all_scales[i], address + i * 8 * kRowBytes);
    }
    if (inside == kBlocks - 1) {
      ptx::fence_async_proxy();
      ptx::named_barrier_arrive(full_barrier(stage, kHalf), kHandOverThreads);
      handed_over |= 1u << stage;
    }
  }
}

// All rows of this CTA.
template <int kHalf, typename Memory>
__device__ __forceinline__ void produce_rows(const SparseAttention& attention, const Memory& memory, int pair) {
  const uint32_t head_tiles = (attention.heads + kHeads - 1) / kHeads;
  const uint32_t work = static_cast<uint32_t>(attention.rows) * head_tiles;
  uint32_t handed_over = 0;
  for (uint32_t tile = blockIdx.x; tile < work; tile += gridDim.x) {
    const RowKeys keys = keys_of_row(attention.keys, attention.rope, tile / head_tiles);
    produce<kHalf>(attention.keys, keys, memory, pair, handed_over);
  }
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) take_back<kHalf>(stage, handed_over);
}

// Producing warp number `warp` of the CTA.
template <typename Memory>
__device__ __forceinline__ void produce_rows(const SparseAttention& attention, const Memory& memory, int warp) {
  constexpr int kHalfWarps = kProducerWarps / 2;
  if (warp < kHalfWarps) {
    produce_rows<0>(attention, memory, warp);
  } else {
    produce_rows<1>(attention, memory, warp - kHalfWarps);
  }
}

}  // namespace dsv4::wide

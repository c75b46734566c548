// The producing warps of sparse_attention_wide.cu: keys of paged pools, gathered, unpacked and written to tiles.
//
// A warp has one half of the dimensions and 16 keys of every tile, which it takes in two blocks of 8: lane l has key
// l / 4 of a block, and of every group of 64 dimensions the quarter l % 4, for the reasons given in producer.cuh. While
// the first block is unpacked, the second one is loaded into the same registers, a piece after each piece; the first
// block of the next tile is loaded once the tile is handed over. Keys are looked up for two tiles at a time, a lane for
// each: their indices two batches ahead, their pages one batch ahead. A value is loaded into the registers that it is
// used from: a copy at the end of a loop would wait for it.
#pragma once

#include "attention/keys.cuh"
#include "attention/wide_tiles.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace dsv4::wide {

constexpr int kWarpKeys = kUnit / (kProducerWarps / 2);  // of a warp in a tile
constexpr int kBlock = 8;                                // keys of a warp at a time
constexpr int kBlocks = kWarpKeys / kBlock;              // of a warp in a tile
constexpr int kBatch = kWarp / kWarpKeys;                // tiles whose keys are looked up together
static_assert(kBlocks == 2);

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

// Entries of two batches of keys, each in a register of its own from the load to its use.
struct Entries {
  int32_t even = kNoEntry, odd = kNoEntry;  // of batches

  // The entry of a key as entry_of_key finds it, under way if it is an index.
  __device__ __forceinline__ void find(const KeySources& sources, const RowKeys& row, int batch, int key) {
    const int place = key - row.window_keys, ring = ring_entries(sources);
    const bool exists = key < row.count, window = place < 0, is_odd = batch % 2 != 0;
    int entry = window ? row.first_entry + key : place;
    if (window && entry >= ring) entry -= ring;
    if (!exists) entry = kNoEntry;
    even = is_odd ? even : entry;
    odd = is_odd ? entry : odd;
    const bool is_index = exists && !window && row.indices != nullptr;
    ptx::load_global_if(even, row.indices + place, is_index && !is_odd);
    ptx::load_global_if(odd, row.indices + place, is_index && is_odd);
  }
  __device__ __forceinline__ int of(int batch) const { return batch % 2 != 0 ? odd : even; }
};

// Its page, under way.
__device__ __forceinline__ void find_page(const KeySources& sources, const RowKeys& row, Lookup& lookup) {
  const bool window = lookup.key < row.window_keys;
  const Pool& pool = window ? sources.window_pool : sources.compressed_pool;
  const int page = divide(max(lookup.entry, 0), window ? sources.window_page : sources.compressed_page);
  ptx::load_global_if(lookup.page, pool.table + row.sequence * pool.table_stride + page, lookup.entry >= 0);
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

// Of a lane and its two keys of a tile: where their half lies, and what is loaded of it, always one part of both keys.
template <int kHalf>
struct Share {
  static constexpr int kRopeSlab = kHalf == 1 ? kHalfSlabs - 1 : kHalfSlabs;
  const uint8_t* data[kBlocks];
  uint32_t scales[kBlocks];  // a byte for each group of the half
  uint4 pieces[kBlocks][kPartSlabs + kHalf];

  // To the keys that lanes from `first` on have looked up; their scales are under way.
  __device__ __forceinline__ void aim(const KeyPlace& places, int first) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int from = first + block * kBlock + lane / 4;
      data[block] = from_lane(places.data, from) + kHalf * (kDim / 2) + lane % 4 * 16;
      scales[block] = ptx::load_global(from_lane(places.scales, from) + kHalf * 4);
    }
  }

  // What becomes a slab of a key: 16 codes, or 16 rope dimensions.
  template <int kPart>
  __device__ __forceinline__ void load(int block, int slab) {
    const uint8_t* const from = data[block] + (kPart * kPartSlabs + slab) * 64;
    if (kPart * kPartSlabs + slab < kRopeSlab) {
      pieces[block][slab] = ptx::load_once(from);
    } else {
      const int quarter = threadIdx.x % 4;
      pieces[block][slab] = ptx::load_once(from + quarter * 16);
      pieces[block][slab + kHalf] = ptx::load_once(from + quarter * 16 + 16);
    }
  }

  // The same as two chunks of bf16. `bytes` are scales of the half; some are above kLargestScale if `large`.
  template <int kPart>
  __device__ __forceinline__ void unpack(int block, int slab, uint32_t bytes, bool large, uint4& first,
                                         uint4& second) const {
    if (kPart * kPartSlabs + slab < kRopeSlab) {
      const uint32_t byte = __byte_perm(bytes, 0, 0x4440 + kPart * kPartSlabs + slab);
      unpack_e4m3(pieces[block][slab], first_factor(min(byte, kLargestScale)), first, second);
      if (large && byte > kLargestScale) {
        multiply_chunk(first, second_factor(byte));
        multiply_chunk(second, second_factor(byte));
      }
    } else {
      first = pieces[block][slab];
      second = pieces[block][slab + kHalf];
    }
  }
};

// Unpack a part of a tile to `tile`, this lane's first chunk of the half's first slab, and load the next part piece by
// piece into the registers that it leaves.
template <int kHalf, int kPart>
__device__ __forceinline__ void write_part(Share<kHalf>& share, const uint32_t (&bytes)[kBlocks], bool large,
                                           uint32_t tile) {
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int slab = 0; slab < kPartSlabs; ++slab) {
      uint4 first, second;
      share.template unpack<kPart>(block, slab, bytes[block], large, first, second);
      const uint32_t offset = block * kBlock * kRowBytes + (kPart * kPartSlabs + slab) * kSlabBytes;
      ptx::store_shared(tile + offset, first);
      ptx::store_shared((tile ^ 16) + offset, second);
      share.template load<1 - kPart>(block, slab);
      __syncwarp();  // keeps ptxas from moving the loads to the end of the loop
    }
  }
}

// Which stages the consumers have been given, and how often, by the producers of a half.
struct Given {
  uint32_t stages = 0, parities = 0;  // a bit of each stage

  // Wait until a part of the half is the producers' again.
  __device__ __forceinline__ void wait(const HandOvers& hand_overs, int stage, int half, int part) const {
    if (stages >> stage & 1) {
      ptx::mbarrier_wait(hand_overs.empty(stage, half * kHalfParts + part), parities >> stage & 1);
    }
  }
  // All of it is theirs, after both waits.
  __device__ __forceinline__ void take_back(int stage) {
    parities ^= stages & 1u << stage;
    stages &= ~(1u << stage);
  }
  __device__ __forceinline__ void take_back(const HandOvers& hand_overs, int stage, int half) {
#pragma unroll
    for (int part = 0; part < kHalfParts; ++part) wait(hand_overs, stage, half, part);
    take_back(stage);
  }
  __device__ __forceinline__ void give(int stage) { stages |= 1u << stage; }
};

// A part of a tile is written.
__device__ __forceinline__ void hand_over(const HandOvers& hand_overs, int stage, int half, int part) {
  ptx::mbarrier_arrive(hand_overs.full(stage, half * kHalfParts + part));
}

// Write the tiles of a row: half kHalf, and of the half's warps number `pair`.
template <int kHalf>
__device__ __forceinline__ void produce(const KeySources& sources, const RowKeys& row, const SharedMemory& memory,
                                        int pair, Given& given) {
  const int lane = threadIdx.x % kWarp, column = lane / 4, quarter = lane % 4;
  const int units = (row.count + kUnit - 1) / kUnit;
  if (units == 0) return;
  const int first_key = pair * kWarpKeys;
  const uint32_t tiles = ptx::shared_address(memory.keys) + kHalf * kHalfSlabs * kSlabBytes + first_key * kRowBytes +
                         chunk_offset(column, 2 * quarter);
  const uint32_t valid = ptx::shared_address(memory.valid) + first_key / 8;

  const auto key_of = [&](int batch) {
    return (batch * kBatch + lane / kWarpKeys) * kUnit + first_key + lane % kWarpKeys;
  };
  Entries entries;
  entries.find(sources, row, 0, key_of(0));
  entries.find(sources, row, 1, key_of(1));
  Lookup upcoming{key_of(0), entries.of(0), 0};
  find_page(sources, row, upcoming);
  KeyPlace ready;
  uint32_t present;  // of the keys in `ready`
  const auto advance = [&](int batch) {
    ready = place_of(sources, row, upcoming);
    present = __ballot_sync(kAllLanes, upcoming.entry >= 0);
    upcoming = {key_of(batch + 1), entries.of(batch + 1), 0};
    find_page(sources, row, upcoming);
    entries.find(sources, row, batch + 2, key_of(batch + 2));
  };
  advance(0);

  static_assert(kHalfParts == 2);
  Share<kHalf> share;
  share.aim(ready, 0);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int slab = 0; slab < kPartSlabs; ++slab) share.template load<0>(block, slab);
  }
  for (int unit = 0; unit < units; ++unit) {
    const int stage = unit % kStages;
    const uint32_t tile = tiles + stage * kTileBytes, bytes[kBlocks] = {share.scales[0], share.scales[1]};
    const uint32_t both = large_scales(bytes[0]) | large_scales(bytes[1]);
    const bool large = __any_sync(kAllLanes, (both & (~0u >> 8 * kHalf)) != 0);
    given.wait(memory.hand_overs, stage, kHalf, 0);
    if (kHalf == 0 && lane == 0) {
      ptx::store_shared(valid + 8 * stage, static_cast<uint16_t>(present >> unit % kBatch * kWarpKeys));
    }
    write_part<kHalf, 0>(share, bytes, large, tile);
    hand_over(memory.hand_overs, stage, kHalf, 0);
    given.wait(memory.hand_overs, stage, kHalf, 1);
    given.take_back(stage);
    // After the last tile a part of it is loaded again, and not used.
    const int next = min(unit + 1, units - 1);
    if (unit + 1 == next && next % kBatch == 0) advance(next / kBatch);
    share.aim(ready, next % kBatch * kWarpKeys);
    write_part<kHalf, 1>(share, bytes, large, tile);
    hand_over(memory.hand_overs, stage, kHalf, 1);
    given.give(stage);
  }
}

// produce(keys) for all rows of this CTA.
template <typename Produce>
__device__ __forceinline__ void for_rows(const SparseAttention& attention, Produce produce) {
  const uint32_t head_tiles = (attention.heads + kHeads - 1) / kHeads;
  const uint32_t work = static_cast<uint32_t>(attention.rows) * head_tiles;
  const auto position = [&](uint32_t tile) {
    return *position_of(attention.rope, min(tile, work - 1) / head_tiles);
  };
  int next = position(blockIdx.x);
  for (uint32_t tile = blockIdx.x; tile < work; tile += gridDim.x) {
    const RowKeys keys = keys_of_row(attention.keys, attention.rope, tile / head_tiles, next);
    next = position(tile + gridDim.x);
    produce(keys);
  }
}

template <int kHalf>
__device__ __forceinline__ void produce_rows(const SparseAttention& attention, const SharedMemory& memory, int pair) {
  Given given;
  for_rows(attention, [&](const RowKeys& keys) { produce<kHalf>(attention.keys, keys, memory, pair, given); });
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) given.take_back(memory.hand_overs, stage, kHalf);
}

// Producing warp number `warp` of the CTA.
__device__ __forceinline__ void produce_rows(const SparseAttention& attention, const SharedMemory& memory, int warp) {
  constexpr int kHalfWarps = kProducerWarps / 2;
  if (warp < kHalfWarps) {
    produce_rows<0>(attention, memory, warp);
  } else {
    produce_rows<1>(attention, memory, warp - kHalfWarps);
  }
}

}  // namespace dsv4::wide

// The producing warps of sparse_attention_wide.cu where keys lie unpacked (unpack_keys.cu): they gather tiles of them.
//
// A warp has one half of the dimensions and 16 keys of every tile, and takes them a slab at a time: 4 loads of a lane,
// each of which brings 128 bytes of 4 keys. A part of a tile is loaded once the part before is handed over and waits in
// registers until its place is free. It is not loaded earlier: fence.proxy.async waits for loads that are under way.
#pragma once

#include "attention/unpacked.cuh"
#include "attention/wide_producer.cuh"

namespace dsv4::wide {

constexpr int kLoads = kWarpKeys / 4;  // of a lane for a slab
constexpr int kAhead = kPartSlabs;     // slabs in registers
static_assert(kHalfParts == 2);

// Of one warp: its keys of a tile and what it holds of them.
struct Copier {
  const uint8_t* from;  // this lane's chunk of slab 0 of entry 0
  uint4 parts[kAhead][kLoads];
  uint32_t entries[kLoads];  // of the tile

  // To the keys that 16 lanes from `first` on have looked up.
  __device__ __forceinline__ void aim(uint32_t found, int first) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      entries[i] = __shfl_sync(kAllLanes, found, first + 4 * i + threadIdx.x % kWarp / 8);
    }
  }
  __device__ __forceinline__ void load(int first_slab) {
#pragma unroll
    for (int slab = 0; slab < kAhead; ++slab) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const uint8_t* const entry = from + uint64_t{entries[i]} * kUnpackedBytes;
        parts[slab][i] = ptx::load_once(entry + (first_slab + slab) * kRowBytes);
      }
    }
  }
  // `to`: of this lane's chunk of slab 0.
  __device__ __forceinline__ void store(int first_slab, const uint32_t (&to)[2], uint32_t tile) const {
#pragma unroll
    for (int slab = 0; slab < kAhead; ++slab) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        ptx::store_shared(to[i % 2] + tile + (first_slab + slab) * kSlabBytes + i / 2 * 8 * kRowBytes, parts[slab][i]);
      }
    }
  }
};

// Write the tiles of a row: half `half`, and of the half's warps number `pair`.
__device__ __forceinline__ void copy_row(const SparseAttention& attention, const RowKeys& row,
                                         const SharedMemory& memory, int half, int pair, Given& given) {
  const KeySources& sources = attention.keys;
  const int lane = threadIdx.x % kWarp, first_key = pair * kWarpKeys;
  const int units = units_of_row(row);
  if (units == 0) return;
  const uint32_t keys = ptx::shared_address(memory.keys) + half * kHalfSlabs * kSlabBytes + first_key * kRowBytes;
  const uint32_t to[2] = {keys + chunk_offset(lane / 8, lane % 8), keys + chunk_offset(4 + lane / 8, lane % 8)};
  const uint32_t valid = ptx::shared_address(memory.valid) + first_key / 8;

  const auto key_of = [&](int batch) {
    return (batch * kBatch + lane / kWarpKeys) * kUnit + first_key + lane % kWarpKeys;
  };
  Entries entries;
  entries.find(sources, row, 0, key_of(0));
  entries.find(sources, row, 1, key_of(1));
  uint32_t found, present;  // of the tiles of a batch
  const auto advance = [&](int batch) {
    const int entry = entries.of(batch);
    found = unpacked_entry(sources, row, key_of(batch), entry);
    present = __ballot_sync(kAllLanes, entry >= 0);
    entries.find(sources, row, batch + 2, key_of(batch + 2));
  };
  advance(0);
  Copier copier;
  copier.from = attention.unpacked.entries + half * (kUnpackedBytes / 2) + lane % 8 * 16;
  copier.aim(found, 0);
  copier.load(0);
  for (int unit = 0; unit < units; ++unit) {
    const int stage = unit % kStages;
    given.wait(memory.hand_overs, stage, half, 0);
    if (half == 0 && lane == 0) {
      ptx::store_shared(valid + 8 * stage, static_cast<uint16_t>(present >> unit % kBatch * kWarpKeys));
    }
    copier.store(0, to, stage * kTileBytes);
    ptx::fence_async_proxy();
    hand_over(memory.hand_overs, stage, half, 0);
    copier.load(kAhead);
    given.wait(memory.hand_overs, stage, half, 1);
    given.take_back(stage);
    copier.store(kAhead, to, stage * kTileBytes);
    ptx::fence_async_proxy();
    hand_over(memory.hand_overs, stage, half, 1);
    given.give(stage);
    if (unit + 1 == units) break;
    if ((unit + 1) % kBatch == 0) advance((unit + 1) / kBatch);
    copier.aim(found, (unit + 1) % kBatch * kWarpKeys);
    copier.load(0);
  }
}

// All rows of this CTA, by producing warp number `warp`.
__device__ __forceinline__ void copy_rows(const SparseAttention& attention, const SharedMemory& memory, int warp) {
  constexpr int kHalfWarps = kProducerWarps / 2;
  const int half = warp / kHalfWarps;
  Given given;
  for_rows(attention, [&](const RowKeys& keys) {
    copy_row(attention, keys, memory, half, warp % kHalfWarps, given);
  });
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) given.take_back(memory.hand_overs, stage, half);
}

}  // namespace dsv4::wide

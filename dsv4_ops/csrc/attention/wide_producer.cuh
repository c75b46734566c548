// The producing warps of sparse_attention_wide.cu: keys of paged pools, gathered, unpacked and written to tiles.
//
// A warp has 16 keys of every tile, in two blocks of 8: lane l has key l / 4 of a block, and of every group of 64
// dimensions the quarter l % 4, for the reasons given in producer.cuh. Latency bounds it, so what counts is the bytes
// that it has under way: all of its keys of the next tile, all the time. As soon as a piece of a key is unpacked, the
// same piece of the next tile is loaded into the registers that it leaves.
#pragma once

#include "attention/wide_keys.cuh"
#include "attention/wide_tiles.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace dsv4::wide {

// Of a lane: where its keys of the next tile lie, and what is loaded of them: 16 codes or half of 16 rope dimensions a
// piece, in the order of memory.
struct Share {
  static constexpr int kPieces = kSlabs + 1;
  const uint8_t* data[kBlocks];
  uint2 scales[kBlocks];  // a byte for each group
  uint4 pieces[kBlocks][kPieces];

  // To a tile whose keys have been looked up.
  __device__ __forceinline__ void aim(const KeyFinder& finder, int unit) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const FoundKey key = finder.found(unit, block * kBlock + lane / 4);
      data[block] = key.data + lane % 4 * 16;
      scales[block] = key.scales;
    }
  }

  __device__ __forceinline__ void load(int block, int slab) {
    const uint8_t* const from = data[block] + slab * 64;
    if (slab < kSlabs - 1) {
      pieces[block][slab] = ptx::load_once(from);
    } else {
      const int quarter = threadIdx.x % 4;
      pieces[block][slab] = ptx::load_once(from + quarter * 16);
      pieces[block][slab + 1] = ptx::load_once(from + quarter * 16 + 16);
    }
  }

  // What becomes a slab of a key, as two chunks of bf16. Some of the scales are above kLargestScale if `large`.
  __device__ __forceinline__ void unpack(int block, int slab, uint2 bytes, bool large, uint4& first,
                                         uint4& second) const {
    if (slab == kSlabs - 1) {
      first = pieces[block][slab];
      second = pieces[block][slab + 1];
      return;
    }
    const uint32_t byte = __byte_perm(slab < 4 ? bytes.x : bytes.y, 0, 0x4440 + slab % 4);
    unpack_e4m3(pieces[block][slab], first_factor(min(byte, kLargestScale)), first, second);
    if (large && byte > kLargestScale) {
      multiply_chunk(first, second_factor(byte));
      multiply_chunk(second, second_factor(byte));
    }
  }
};

// Which stages the consumers have been given, and how often.
struct Given {
  uint32_t stages = 0, parities = 0;  // a bit of each stage

  // Wait until a part is the producers' again.
  __device__ __forceinline__ void wait(const HandOvers& hand_overs, int stage, int part) const {
    if (stages >> stage & 1) ptx::mbarrier_wait(hand_overs.empty(stage, part), parities >> stage & 1);
  }
  // All of the tile is theirs, after the waits for its parts.
  __device__ __forceinline__ void take_back(int stage) {
    parities ^= stages & 1u << stage;
    stages &= ~(1u << stage);
  }
  __device__ __forceinline__ void give(int stage) { stages |= 1u << stage; }
};

// Write the tiles of a row: the keys of producing warp number `warp`.
__device__ __forceinline__ void produce_row(const KeySources& sources, const RowKeys& row, SharedMemory& memory,
                                            int warp, Given& given) {
  const int lane = threadIdx.x % kWarp, units = units_of_row(row), first_key = warp * kWarpKeys;
  if (units == 0) return;
  const uint32_t tiles =
      ptx::shared_address(memory.keys) + first_key * kRowBytes + chunk_offset(lane / 4, lane % 4 * 2);
  const uint32_t valid = ptx::shared_address(memory.valid) + first_key / 8;
  KeyFinder finder(sources, row, memory.found[warp], warp);
  finder.advance(0);
  Share share;
  share.aim(finder, 0);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) share.load(block, slab);
  }
  for (int unit = 0; unit < units; ++unit) {
    const int stage = unit % kStages, next = min(unit + 1, units - 1);
    const uint32_t tile = tiles + stage * kTileBytes, present = finder.present(unit);
    uint2 bytes[kBlocks];
    uint32_t large_ones = 0;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      bytes[block] = share.scales[block];
      large_ones |= large_scales(bytes[block].x) | large_scales(bytes[block].y & 0xFFFFFFu);
    }
    const bool large = __any_sync(kAllLanes, large_ones != 0);
    // After the last tile, that tile is loaded again, and not used.
    if (next > unit && next % kBatch == 0) finder.advance(next / kBatch);
    share.aim(finder, next);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      given.wait(memory.hand_overs, stage, part);
      if (part == 0 && lane == 0) ptx::store_shared(valid + 8 * stage, static_cast<uint16_t>(present));
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int slab = part * kPartSlabs; slab < (part + 1) * kPartSlabs; ++slab) {
          uint4 first, second;
          share.unpack(block, slab, bytes[block], large, first, second);
          const uint32_t offset = block * kBlock * kRowBytes + slab * kSlabBytes;
          ptx::store_shared(tile + offset, first);
          ptx::store_shared((tile ^ 16) + offset, second);
          share.load(block, slab);
          __syncwarp();  // keeps ptxas from moving the loads to the end of the loop
        }
      }
      ptx::mbarrier_arrive(memory.hand_overs.full(stage, part));
    }
    given.take_back(stage);
    given.give(stage);
  }
}

// All rows of this CTA, by producing warp number `warp`.
__device__ __forceinline__ void produce_rows(const SparseAttention& attention, SharedMemory& memory, int warp) {
  const uint32_t head_tiles = (attention.heads + kHeads - 1) / kHeads;
  const uint32_t work = static_cast<uint32_t>(attention.rows) * head_tiles;
  const auto position = [&](uint32_t tile) {
    return *position_of(attention.rope, min(tile, work - 1) / head_tiles);
  };
  Given given;
  int next = position(blockIdx.x);
  for (uint32_t tile = blockIdx.x; tile < work; tile += gridDim.x) {
    const RowKeys row = keys_of_row(attention.keys, attention.rope, tile / head_tiles, next);
    next = position(tile + gridDim.x);
    produce_row(attention.keys, row, memory, warp, given);
  }
  for (int stage = 0; stage < kStages; ++stage) {
    for (int part = 0; part < kParts; ++part) given.wait(memory.hand_overs, stage, part);
  }
}

}  // namespace dsv4::wide

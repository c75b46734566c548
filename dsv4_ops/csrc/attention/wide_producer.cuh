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

#if PW == 4
using Present = uint16_t;
#else
using Present = uint8_t;
#endif

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

  // What becomes a slab of a key, as two chunks of bf16; but for what multiply_again does.
  __device__ __forceinline__ void unpack(int block, int slab, uint2 bytes, uint4& first, uint4& second) const {
    if (slab == kSlabs - 1) {
      first = pieces[block][slab];
      second = pieces[block][slab + 1];
    } else {
      unpack_e4m3(pieces[block][slab], first_factor(min(scale_of(bytes, slab), kLargestScale)), first, second);
    }
  }

  __device__ __forceinline__ static uint32_t scale_of(uint2 bytes, int slab) {
    return __byte_perm(slab < 4 ? bytes.x : bytes.y, 0, 0x4440 + slab % 4);
  }
};

// The second factor of the chunks at two addresses of every slab of a part, where the scale is above kLargestScale.
__device__ __forceinline__ void multiply_again(uint2 bytes, int part, uint32_t address) {
  for (int slab = part * kPartSlabs; slab < min((part + 1) * kPartSlabs, kSlabs - 1); ++slab) {
    const uint32_t byte = (slab < 4 ? bytes.x : bytes.y) >> slab % 4 * 8 & 0xFF;
    if (byte <= kLargestScale) continue;
    for (const uint32_t at : {address, address ^ 16}) {
      uint4 chunk = ptx::load_shared(at + slab * kSlabBytes);
      multiply_chunk(chunk, second_factor(byte));
      ptx::store_shared(at + slab * kSlabBytes, chunk);
    }
  }
}

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

// Write a part of this lane's keys of a tile, whose first chunks lie at `tile`, and load what follows.
__device__ __forceinline__ void write_part(Share& share, const uint2 (&bytes)[kBlocks], bool large, int part,
                                           uint32_t tile) {
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const uint32_t at = tile + block * kBlock * kRowBytes;
#pragma unroll
    for (int slab = part * kPartSlabs; slab < (part + 1) * kPartSlabs; ++slab) {
      uint4 first, second;
      share.unpack(block, slab, bytes[block], first, second);
      ptx::store_shared(at + slab * kSlabBytes, first);
      ptx::store_shared((at ^ 16) + slab * kSlabBytes, second);
      share.load(block, slab);
      __syncwarp();  // keeps ptxas from moving the loads to the end of the loop
    }
    if (large) multiply_again(bytes[block], part, at);
  }
}

// All rows of this CTA, by producing warp number `warp`.
__device__ __forceinline__ void produce_rows(const SparseAttention& attention, SharedMemory& memory, int warp) {
  const int lane = threadIdx.x % kWarp, first_key = warp * kWarpKeys;
  const uint32_t tiles =
      ptx::shared_address(memory.keys) + first_key * kRowBytes + chunk_offset(lane / 4, lane % 4 * 2);
  const uint32_t valid = ptx::shared_address(memory.valid) + first_key / 8;
  KeyFinder finder(attention, memory.found[warp], warp);
  finder.advance();
  Share share;
  share.aim(finder, 0);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) share.load(block, slab);
  }
  Given given;
  Rows rows(attention);
  RowKeys row;
  while (rows.advance(row)) {
    const int units = units_of_row(row);
    for (int unit = 0; unit < units; ++unit) {
      const int stage = unit % kStages, next = unit + 1 < units ? unit + 1 : 0;
      const uint32_t present = finder.present(unit);
      uint2 bytes[kBlocks];
      uint32_t large_ones = 0;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        bytes[block] = share.scales[block];
        large_ones |= large_scales(bytes[block].x) | large_scales(bytes[block].y & 0xFFFFFFu);
      }
      const bool large = __any_sync(kAllLanes, large_ones != 0);
      if (next % kBatch == 0) finder.advance();
      share.aim(finder, next);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        given.wait(memory.hand_overs, stage, part);
        if (part == 0 && lane == 0) {
          ptx::store_shared(valid + 8 * stage, static_cast<Present>(present));
        }
        write_part(share, bytes, large, part, tiles + stage * kTileBytes);
        ptx::mbarrier_arrive(memory.hand_overs.full(stage, part));
      }
      given.take_back(stage);
      given.give(stage);
    }
  }
  for (int stage = 0; stage < kStages; ++stage) {
    for (int part = 0; part < kParts; ++part) given.wait(memory.hand_overs, stage, part);
  }
}

}  // namespace dsv4::wide

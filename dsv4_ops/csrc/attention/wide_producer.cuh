// The producing warps of sparse_attention_wide.cu: keys of paged pools, gathered, unpacked and written to tiles.
//
// A warp has 8 keys of every tile: lane l has key l / 4, and of every group of 64 dimensions the quarter l % 4, for the
// reasons given in producer.cuh. Latency bounds it, so what counts is the bytes that it has under way: all codes of its
// next keys, all the time. As soon as a piece of a key is unpacked, the same piece of the next key is loaded into the
// registers that it leaves. Nothing else is loaded to registers: there are six scoreboards, and who waits for one waits
// for all loads that share it. Rope dimensions need no unpacking, and are copied.
#pragma once

#include "attention/wide_keys.cuh"
#include "attention/wide_tiles.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace dsv4::wide {

// Of a lane: where its next key lies, and 16 codes of each of its groups. A line of a key has those of two groups, so
// its loads go through L1. Rows of a chunk see the same keys again.
template <Fold kFold>
struct Codes {
  static constexpr int kPieces = kNope / kSlab;
  const uint8_t* key;
  uint4 pieces[kPieces];

  __device__ __forceinline__ void load(int piece) {
    const uint8_t* const from = key + threadIdx.x % 4 * 16 + piece * kSlab;
    pieces[piece] = kFold == Fold::kRunning ? ptx::load_16(from) : ptx::load_shared_line(from);
  }
};

__device__ __forceinline__ uint32_t scale_of(uint2 scales, int group) {
  return __byte_perm(group < 4 ? scales.x : scales.y, 0, 0x4440 + group % 4);
}

// The second factor of the chunks at `tile` of a slab, and of those next to them, where the scale is above
// kLargestScale.
__device__ __forceinline__ void multiply_again(uint32_t byte, uint32_t tile) {
  if (byte <= kLargestScale) return;
  for (const uint32_t at : {tile, tile ^ 16}) {
    uint4 chunk = ptx::load_shared(at);
    multiply_chunk(chunk, second_factor(byte));
    ptx::store_shared(at, chunk);
  }
}

// All units of this CTA's rows, by producing warp number `warp`.
template <Fold kFold>
__device__ __forceinline__ void produce_rows(const SparseAttention& attention, SharedMemory& memory, int warp) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t keys =
      ptx::shared_address(memory.keys) + chunk_offset(warp * kWarpKeys + lane / 4, lane % 4 * 2);
  KeyFinder finder(attention, memory.warp_keys[warp], warp);
  finder.advance();
  ptx::cp_async_commit();  // stands for rope dimensions of a tile before
  constexpr int kPieces = Codes<kFold>::kPieces;
  Codes<kFold> codes;
  codes.key = finder.data(0, lane / 4);
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) codes.load(piece);
  int in_batch = 0;
  for (uint32_t unit = 0; finder.units() > 0; ++unit) {
    const uint32_t stage = unit % kStages, tile = keys + stage * kTileBytes;
    ptx::cp_async_wait<1>();  // all but the rope dimensions of the tile before
    __syncwarp();
    const uint2 scales = finder.scales(in_batch, lane / 4);
    const uint8_t present = finder.present(in_batch);
    const uint8_t* const rope = codes.key + kNope + lane % 4 * 32;
    const bool large = __any_sync(kAllLanes, (large_scales(scales.x) | large_scales(scales.y & 0xFFFFFFu)) != 0);
    if (++in_batch == finder.units()) {
      finder.advance();  // after the last unit, to keys that are absent, which are loaded and not used
      in_batch = 0;
    }
    codes.key = finder.data(in_batch, lane / 4);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      memory.hand_overs.wait_empty(unit, part);
      if (part == 0 && lane == 0) memory.valid[stage][warp] = present;
      if (part == kParts - 1) {
        uint8_t* const to = memory.keys + stage * kTileBytes + (kSlabs - 1) * kSlabBytes;
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) {
          ptx::cp_async_16(to + chunk_offset(warp * kWarpKeys + lane / 4, lane % 4 * 2 + chunk), rope + chunk * 16, 16);
        }
        ptx::cp_async_commit();
        ptx::cp_async_arrive(memory.hand_overs.full(stage, part));
      }
#pragma unroll
      for (int slab = part * kPartSlabs; slab < min((part + 1) * kPartSlabs, kPieces); ++slab) {
        uint4 first, second;
        unpack_e4m3(codes.pieces[slab], first_factor(min(scale_of(scales, slab), kLargestScale)), first, second);
        ptx::store_shared(tile + slab * kSlabBytes, first);
        ptx::store_shared((tile ^ 16) + slab * kSlabBytes, second);
        codes.load(slab);
        __syncwarp();  // keeps ptxas from moving the loads to the end of the loop
      }
      if (large) {
        for (int slab = part * kPartSlabs; slab < min((part + 1) * kPartSlabs, kPieces); ++slab) {
          multiply_again(scale_of(scales, slab), tile + slab * kSlabBytes);
        }
      }
      ptx::mbarrier_arrive(memory.hand_overs.full(stage, part));
    }
  }
  ptx::cp_async_wait<0>();
}

}  // namespace dsv4::wide

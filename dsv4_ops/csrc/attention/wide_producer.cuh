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

// Unpack the codes of a part of a tile, whose first chunk of this lane lies at `tile`, and load those of the next key.
// `scales` are of the key, and some are above kLargestScale if `large`.
template <Fold kFold>
__device__ __forceinline__ void write_part(Codes<kFold>& codes, uint2 scales, bool large, int part, uint32_t tile) {
  const int first_slab = part * kPartSlabs, end = min(first_slab + kPartSlabs, Codes<kFold>::kPieces);
#pragma unroll
  for (int slab = first_slab; slab < end; ++slab) {
    uint4 first, second;
    unpack_e4m3(codes.pieces[slab], first_factor(min(scale_of(scales, slab), kLargestScale)), first, second);
    ptx::store_shared(tile + slab * kSlabBytes, first);
    ptx::store_shared((tile ^ 16) + slab * kSlabBytes, second);
    codes.load(slab);
    __syncwarp();  // keeps ptxas from moving the loads to the end of the loop
  }
  if (!large) return;
  for (int slab = first_slab; slab < end; ++slab) multiply_again(scale_of(scales, slab), tile + slab * kSlabBytes);
}

// Copy this lane's quarter of a key's rope dimensions to a tile; they arrive at `barrier` by themselves.
__device__ __forceinline__ void copy_rope(const uint8_t* key, uint32_t tile, uint32_t barrier) {
  const uint8_t* const rope = key + kNope + threadIdx.x % 4 * 32;
  const uint32_t to = tile + (kSlabs - 1) * kSlabBytes;
  ptx::cp_async_16(to, rope);
  ptx::cp_async_16(to ^ 16, rope + 16);
  ptx::cp_async_commit();
  ptx::cp_async_arrive(barrier);
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
  Codes<kFold> codes;
  codes.key = finder.data(0, lane / 4);
#pragma unroll
  for (int piece = 0; piece < Codes<kFold>::kPieces; ++piece) codes.load(piece);
  int in_batch = 0;
  for (uint32_t unit = 0; finder.units() > 0; ++unit) {
    const uint32_t stage = unit % kStages, tile = keys + stage * kTileBytes;
    ptx::cp_async_wait<1>();  // all but the rope dimensions of the tile before
    __syncwarp();
    const uint2 scales = finder.scales(in_batch, lane / 4);
    const uint8_t present = finder.present(in_batch);
    const uint8_t* const key = codes.key;
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
      const uint32_t full = memory.hand_overs.full(stage, part);
      if (part == kParts - 1) copy_rope(key, tile, full);
      write_part(codes, scales, large, part, tile);
      ptx::mbarrier_arrive(full);
    }
  }
  ptx::cp_async_wait<0>();
}

}  // namespace dsv4::wide

// The second of the two kernels of sparse_attention_split.cu: the weights of all units times one slab of their keys.
//
// A CTA owns a slab of 64 dimensions of a row and a tile of heads. 384 threads: one or two consuming warpgroups of up
// to 32 heads each, the other warps gather keys. A stage is a unit: 8 KB of keys, 136 bytes a head of weights and
// totals, which are copied as one; there are 6 to 10 of them, so that two CTAs fit an SM.
#pragma once

#include "attention/handed_units.cuh"
#include "attention/output.cuh"
#include "attention/products.cuh"

namespace dsv4 {

// kHeads of a consuming warpgroup, kGroups of those.
template <int kHeads, int kGroups>
struct AddMemory {
  static constexpr int kAll = kHeads * kGroups;
  static constexpr int kGatherWarps = kSplitThreads / 32 - 4 * kGroups;
  static_assert(kUnit % (kGatherWarps * 8) == 0, "whole blocks of a warp in a unit");
  static constexpr int kDepth = kAll == 64 ? 6 : kAll == 32 ? 8 : 10;  // stages
  struct Stage {
    alignas(1024) uint8_t keys[kSlabBytes];
    alignas(128) uint8_t weights[kAll / 8 * kHandedBytes];
  };
  Stage stages[kDepth];
  alignas(16) uint8_t staging[kGroups][kHeads * kStagingStride<kSlab>];
  float reciprocals[kAll];
  alignas(8) uint64_t full[kDepth];
  uint64_t empty[kDepth];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Where add_units_kernel gets what it adds up.
struct WeighedUnits {
  float* partials;
  int64_t first;  // unit of the row
  int padded, first_head;

  // One thread: weights and totals of a unit, for the heads of this CTA.
  template <typename Memory>
  __device__ __forceinline__ void copy(Memory& memory, int unit) const {
    constexpr uint32_t kBytes = sizeof(Memory::Stage::weights);
    typename Memory::Stage& stage = memory.stages[unit % Memory::kDepth];
    const uint32_t full = ptx::shared_address(memory.full + unit % Memory::kDepth);
    const HandedUnit from(partials, padded, first + unit);
    ptx::mbarrier_arrive_expect(full, kBytes);
    ptx::cp_async_bulk(ptx::shared_address(stage.weights), from.of_heads(first_head), kBytes, full);
  }
};

// A producing warp of add_units_kernel: one slab of all keys, in blocks of 8 as in producer.cuh. Lane l has key l / 4
// of a block and quarter l % 4 of its dimensions. It loads 128 bytes at once, of eight blocks or four of the rope slab;
// while those are handed over nothing is under way but the lookups of what follows (see producer.cuh).
// Where a stage is filled again, the wait for the weights has returned, and one thread has those copied too.
template <bool kRope, typename Memory>
__device__ __forceinline__ void gather_slab(const KeySources& sources, const RowKeys& row, Memory& memory,
                                            const WeighedUnits& weighed, int units, int slab, int warp) {
  using Keys = WarpKeys<Memory::kGatherWarps>;
  constexpr int kBlocks = Keys::kBlocks, kBatch = Keys::kBatch;
  constexpr int kLookups = kRope ? 1 : 2, kUnderWay = kLookups * kBatch, kPieces = kRope ? 2 : 1;
  const int lane = threadIdx.x % kWarp, column = lane / 4, quarter = lane % 4;
  const uint32_t full = ptx::shared_address(memory.full), empty = ptx::shared_address(memory.empty);
  const Keys own(0, units, 1, warp);
  Lookup upcoming[kLookups], later[kLookups];
  KeyPlace places[kLookups];
  int batches = 0;  // looked up
  const auto find_entries = [&](Lookup(&found)[kLookups]) {
#pragma unroll
    for (int i = 0; i < kLookups; ++i) found[i] = own.find_entry(sources, row, batches++);
  };
  const auto find_pages = [&] {
#pragma unroll
    for (int i = 0; i < kLookups; ++i) find_page(sources, row, upcoming[i]);
  };
  uint4 parts[kUnderWay][kPieces];
  uint32_t scales[kUnderWay];
  find_entries(upcoming);
  find_entries(later);
  find_pages();
  for (int first = 0; first < own.blocks; first += kUnderWay) {
#pragma unroll
    for (int i = 0; i < kLookups; ++i) {
      places[i] = place_of(sources, row, upcoming[i]);
      upcoming[i] = later[i];
    }
    find_pages();
    find_entries(later);
#pragma unroll
    for (int i = 0; i < kUnderWay; ++i) {
      const KeyPlace& place = places[i / kBatch];
      const int source = i % kBatch * kBlock + column;
      const int offset = kRope ? kNope + quarter * 32 : slab * kSlab + quarter * 16;
      const uint8_t* const data = from_lane(place.data, source) + offset;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) parts[i][piece] = ptx::load_once(data + piece * 16);
      scales[i] = kRope ? 0 : from_lane(place.scales, source)[slab];
    }
    __syncwarp();  // keeps ptxas from moving the loads to where they are used
#pragma unroll
    for (int i = 0; i < kUnderWay; ++i) {
      const int block = first + i, unit = block / kBlocks, stage = unit % Memory::kDepth, use = unit / Memory::kDepth;
      if (block >= own.blocks) break;
      if (block % kBlocks == 0 && use > 0) {
        ptx::mbarrier_wait(empty + 8 * stage, (use - 1) & 1);
        if (warp == 0 && lane == 0) weighed.copy(memory, unit);
      }
      uint4 a, b;
      if constexpr (kRope) {
        a = parts[i][0];
        b = parts[i][1];
        split_pairs(a, b);
      } else {
        unpack_group(parts[i][0], scales[i], a, b);
      }
      const int key = (block % kBlocks * Memory::kGatherWarps + warp) * kBlock + column;
      uint8_t* const keys = memory.stages[stage].keys;
      *reinterpret_cast<uint4*>(keys + chunk_offset(key, 2 * quarter)) = a;
      *reinterpret_cast<uint4*>(keys + chunk_offset(key, 2 * quarter + 1)) = b;
      if (block % kBlocks == kBlocks - 1) {
        ptx::fence_async_proxy();
        ptx::mbarrier_arrive(full + 8 * stage);
      }
    }
  }
}

// A consuming warpgroup: the fold over all units. Every warp has the totals of all heads, head l % kHeads in lane l.
// Products of kTogether units are under way while steps are computed; where fewer are left, the last one is multiplied
// again, and not added: a branch around products would make ptxas serialise them all.
template <int kHeads, int kTogether, typename Memory>
__device__ __forceinline__ void fold_units(Memory& memory, int units, int group, float (&output)[kHeads / 2],
                                           Total& total) {
  const int head = threadIdx.x % min(kHeads, kWarp);
#pragma unroll
  for (int i = 0; i < kHeads / 2; ++i) output[i] = 0.0f;
  for (int first = 0; first < units; first += kTogether) {
    const auto stage_of = [&](int i) { return min(first + i, units - 1) % Memory::kDepth; };
    const auto weights_of = [&](int i) {
      return memory.stages[stage_of(i)].weights + group * (kHeads / 8 * kHandedBytes);
    };
    float parts[kTogether][kHeads / 2];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int unit = min(first + i, units - 1);
      ptx::mbarrier_wait(ptx::shared_address(memory.full + unit % Memory::kDepth), unit / Memory::kDepth & 1);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      multiply_weights<kHeads, kHandedBytes>(ptx::shared_address(memory.stages[stage_of(i)].keys),
                                             ptx::shared_address(weights_of(i)), 0, parts[i]);
    }
    Step own[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const float2 of_unit = *totals_of(weights_of(i), head);
      if (first + i < units) own[i] = total.add(of_unit.x, of_unit.y);
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i >= units) break;
      ptx::pin_registers(parts[i]);
      ptx::mbarrier_arrive(ptx::shared_address(memory.empty + stage_of(i)));
      const Steps<kHeads> steps(own[i]);
      if (steps.rescale) rescale_output<kHeads>(output, steps);
      add_output<kHeads>(output, parts[i], steps);
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace dsv4

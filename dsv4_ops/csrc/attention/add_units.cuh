// The second of the two kernels of sparse_attention_split.cu: the weights of all units times one slab of their keys.
//
// A CTA owns a slab of 64 dimensions of a row and a tile of heads. 384 threads: one or two consuming warpgroups of up
// to 32 heads each, the other warps gather keys. A stage is a unit: 8 KB of keys, 136 bytes a head of weights and
// totals, which are copied as one; there are 6 to 10 of them, so that two CTAs fit an SM. Where the output is
// quantised, two slabs share a scale: their CTAs are a cluster, and each reads the largest magnitudes of the other
// one's heads from its shared memory.
#pragma once

#include "attention/handed_units.cuh"
#include "attention/output.cuh"
#include "attention/products.cuh"

namespace dsv4 {

constexpr int kAddThreads = 3 * kWarpgroup;

// kHeads of a consuming warpgroup, kGroups of those.
template <int kHeads, int kGroups>
struct AddMemory {
  static constexpr int kAll = kHeads * kGroups;
  static constexpr int kGatherWarps = kAddThreads / 32 - 4 * kGroups;
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

// Four blocks of eight keys that a producing warp writes to their stages and hands over at once: no instruction passes
// a wait, so with one for every block hardly any two run at the same time. Lane l has key l / 4 of a block and quarter
// l % 4 of the slab's dimensions, in `parts`; `scale` is that of key l of the batch. Where a stage is filled again, the
// wait for the weights has returned, and one thread has those copied too.
template <bool kRope, typename Memory, int kBatch, int kPieces>
__device__ __forceinline__ void write_batch(Memory& memory, const WeighedUnits& weighed,
                                            const uint4 (&parts)[kBatch][kPieces], uint32_t scale, int first,
                                            int blocks, int warp) {
  constexpr int kBlocks = WarpKeys<Memory::kGatherWarps>::kBlocks;
  const int lane = threadIdx.x % kWarp, column = lane / 4, quarter = lane % 4;
  const auto stage_of = [&](int i) { return (first + i) / kBlocks % Memory::kDepth; };
  const auto chunk_of = [&](int i, int chunk) {
    const int key = (i % kBlocks * Memory::kGatherWarps + warp) * kBlock + column;
    return reinterpret_cast<uint4*>(memory.stages[stage_of(i)].keys + chunk_offset(key, 2 * quarter + chunk));
  };
#pragma unroll
  for (int i = 0; i < kBatch; i += kBlocks) {
    const int unit = (first + i) / kBlocks, use = unit / Memory::kDepth;
    if (first + i >= blocks || use == 0) continue;
    ptx::mbarrier_wait(ptx::shared_address(memory.empty + stage_of(i)), (use - 1) & 1);
    if (warp == 0 && lane == 0) weighed.copy(memory, unit);
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    uint4 a, b;
    if constexpr (kRope) {
      a = parts[i][0];
      b = parts[i][1];
      split_pairs(a, b);
    } else {
      const uint32_t of_key = __shfl_sync(kAllLanes, scale, i * kBlock + column);
      unpack_e4m3(parts[i][0], first_factor(min(of_key, kLargestScale)), a, b);
    }
    if (first + i >= blocks) continue;
    *chunk_of(i, 0) = a;
    *chunk_of(i, 1) = b;
  }
  if (!kRope && __any_sync(kAllLanes, scale > kLargestScale)) {
    for (int i = 0; i < kBatch; ++i) {
      const uint32_t of_key = __shfl_sync(kAllLanes, scale, i * kBlock + column);
      if (first + i >= blocks || of_key <= kLargestScale) continue;
      multiply_chunk(*chunk_of(i, 0), second_factor(of_key));
      multiply_chunk(*chunk_of(i, 1), second_factor(of_key));
    }
  }
#pragma unroll
  for (int i = 0; i < kBatch; i += kBlocks) {
    if (first + i < blocks) ptx::mbarrier_arrive(ptx::shared_address(memory.full + stage_of(i)));
  }
}

// A producing warp of add_units_kernel: one slab of all keys, in blocks of eight and batches of four as in
// producer.cuh. A lane loads 128 bytes at once, of two batches or one of the rope slab.
template <bool kRope, typename Memory>
__device__ __forceinline__ void gather_slab(const KeySources& sources, const RowKeys& row, Memory& memory,
                                            const WeighedUnits& weighed, int units, int slab, int warp) {
  using Keys = WarpKeys<Memory::kGatherWarps>;
  constexpr int kBatch = Keys::kBatch, kBatches = kRope ? 1 : 2, kPieces = kRope ? 2 : 1;
  const int lane = threadIdx.x % kWarp, column = lane / 4, quarter = lane % 4;
  const int offset = kRope ? kNope + quarter * 32 : slab * kSlab + quarter * 16;
  const Keys own(0, units, 1, warp);
  Lookup upcoming[kBatches], later[kBatches];
  int found = 0;  // batches
  const auto find_entries = [&](Lookup(&lookups)[kBatches]) {
#pragma unroll
    for (int i = 0; i < kBatches; ++i) {
      lookups[i].key = own.key(found++);
      const SoughtEntry sought(sources, row, lookups[i].key);
      lookups[i].entry = sought.entry;
      ptx::load_global_if(lookups[i].entry, sought.index, sought.is_index);
    }
  };
  const auto find_pages = [&] {
#pragma unroll
    for (int i = 0; i < kBatches; ++i) upcoming[i].find_page(sources, row);
  };
  find_entries(upcoming);
  find_entries(later);
  find_pages();
  for (int first = 0; first < own.blocks; first += kBatches * kBatch) {
    uint4 parts[kBatches][kBatch][kPieces];
    uint32_t scales[kBatches];
    KeyPlace places[kBatches];
#pragma unroll
    for (int i = 0; i < kBatches; ++i) {
      places[i] = upcoming[i].place(sources, row);
      upcoming[i] = later[i];
      scales[i] = kRope ? 0 : places[i].scales[slab];
    }
#pragma unroll
    for (int i = 0; i < kBatches; ++i) {
#pragma unroll
      for (int block = 0; block < kBatch; ++block) {
        const uint8_t* const data = from_lane(places[i].data, block * kBlock + column) + offset;
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) parts[i][block][piece] = ptx::load_once(data + piece * 16);
      }
    }
    find_pages();
    find_entries(later);
    __syncwarp();  // keeps ptxas from moving the loads to where they are used
#pragma unroll
    for (int i = 0; i < kBatches; ++i) {
      write_batch<kRope>(memory, weighed, parts[i], scales[i], first + i * kBatch, own.blocks, warp);
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
    ptx::fence_async_proxy();
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

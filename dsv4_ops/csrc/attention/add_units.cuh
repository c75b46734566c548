// The second of the two kernels of sparse_attention_split.cu: the weights of all units times one slab of their keys.
//
// A CTA owns a slab of 64 dimensions of a row and a tile of heads. 384 threads: one or two consuming warpgroups of up
// to 32 heads each, the other warps gather keys. A stage is a unit: 8 KB of keys, 136 bytes a head of weights and
// totals, which are copied as one; there are 6 to 12 of them, as many whole steps of the gathering warps as fit an SM
// beside the first kernel. Where the output is quantised, two slabs share a scale: their CTAs are a cluster, and each
// reads the largest magnitudes of the other one's heads from its shared memory.
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
  static constexpr int kDepth = kAll == 64 ? 6 : kAll == 32 ? 8 : 12;  // stages
  static constexpr int kWeightBytes = kAll / 8 * kHandedBytes;
  alignas(1024) uint8_t keys[kDepth][kSlabBytes];
  alignas(128) uint8_t weights[kDepth][kWeightBytes];
  alignas(16) uint8_t staging[kGroups][kHeads * kStagingStride<kSlab>];
  uint32_t magnitudes[kGroups][kHeads];
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
    const int stage = unit % Memory::kDepth;
    const uint32_t full = ptx::shared_address(memory.full + stage);
    const HandedUnit from(partials, padded, first + unit);
    ptx::mbarrier_arrive_expect(full, Memory::kWeightBytes);
    ptx::cp_async_bulk(ptx::shared_address(memory.weights[stage]), from.of_heads(first_head), Memory::kWeightBytes,
                       full);
  }
};

// What a lane has of some blocks of eight keys on their way to shared memory: of key l / 4 of each, quarter l % 4 of
// the slab's dimensions.
template <bool kRope>
struct SlabBlocks {
  static constexpr int kCount = kRope ? 2 : 4, kPieces = kRope ? 2 : 1;
  uint4 parts[kCount][kPieces];
  uint32_t scale;  // not of the rope slab: of the key that lane l has looked up
};

// A producing warp of add_units_kernel: one slab of all keys, in steps of some blocks. As in producer.cuh, the blocks
// of a step are waited for, then those of the next are loaded, then the first are unpacked. All of a step is handed
// over together: no instruction passes a wait, so with one for every block hardly any two would run at the same time.
template <bool kRope, typename Memory>
struct SlabGatherer {
  using Keys = WarpKeys<Memory::kGatherWarps>;
  using Blocks = SlabBlocks<kRope>;
  static constexpr int kUnits = Blocks::kCount / Keys::kBlocks;  // of a step
  const KeySources& sources;
  const RowKeys& row;
  Memory& memory;
  const WeighedUnits& weighed;
  int slab, warp;
  Keys own;
  Lookups lookups;
  KeyPlace places{};

  __device__ __forceinline__ SlabGatherer(const KeySources& sources, const RowKeys& row, Memory& memory,
                                          const WeighedUnits& weighed, int units, int slab, int warp)
      : sources(sources),
        row(row),
        memory(memory),
        weighed(weighed),
        slab(slab),
        warp(warp),
        own(0, units, 1, warp),
        lookups(sources, row, own) {}

  __device__ __forceinline__ int unit(int step, int i) const { return step * kUnits + i; }
  __device__ __forceinline__ bool exists(int step, int i) const { return unit(step, i) * Keys::kBlocks < own.blocks; }
  static __device__ __forceinline__ uint32_t address(const uint64_t (&barriers)[Memory::kDepth], int unit) {
    return ptx::shared_address(barriers + unit % Memory::kDepth);
  }

  __device__ __forceinline__ void load(int step, Blocks& blocks) {
    const int lane = threadIdx.x % kWarp, column = lane / 4, quarter = lane % 4;
    const int offset = kRope ? kNope + quarter * 32 : slab * kSlab + quarter * 16;
    const int batch = step * Blocks::kCount / Keys::kBatch, first = step * Blocks::kCount % Keys::kBatch;
    if (first == 0) places = lookups.upcoming.place(sources, row);
    if (!kRope) blocks.scale = places.scales[slab];
#pragma unroll
    for (int i = 0; i < Blocks::kCount; ++i) {
      const uint8_t* const data = from_lane(places.data, (first + i) * kBlock + column) + offset;
#pragma unroll
      for (int piece = 0; piece < Blocks::kPieces; ++piece) {
        blocks.parts[i][piece] = ptx::load_shared_line(data + piece * 16);
      }
    }
    if (first == 0) {
      lookups.find_pages(sources, row, own, batch + 1);
      lookups.find_entries(sources, row, own, batch + 2);
    }
    __syncwarp();  // keeps ptxas from moving the loads to where they are used
  }

  // The stages of a step are free. Where one is filled again, the wait for the weights has returned, and one thread has
  // those copied too.
  __device__ __forceinline__ void wait(int step) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int use = unit(step, i) / Memory::kDepth;
      if (!exists(step, i) || use == 0) continue;
      ptx::mbarrier_wait(address(memory.empty, unit(step, i)), (use - 1) & 1);
      if (warp == 0 && threadIdx.x % kWarp == 0) weighed.copy(memory, unit(step, i));
    }
  }

  __device__ __forceinline__ void write(int step, const Blocks& blocks, bool large) {
    const int lane = threadIdx.x % kWarp, column = lane / 4, quarter = lane % 4;
    const auto scale_of = [&](int i) { return __shfl_sync(kAllLanes, blocks.scale, i * kBlock + column); };
    const auto chunk_of = [&](int i, int chunk) {
      const int key = (i % Keys::kBlocks * Memory::kGatherWarps + warp) * kBlock + column;
      uint8_t* const keys = memory.keys[unit(step, i / Keys::kBlocks) % Memory::kDepth];
      return reinterpret_cast<uint4*>(keys + chunk_offset(key, 2 * quarter + chunk));
    };
#pragma unroll
    for (int i = 0; i < Blocks::kCount; ++i) {
      uint4 a, b;
      if constexpr (kRope) {
        a = blocks.parts[i][0];
        b = blocks.parts[i][1];
      } else {
        unpack_e4m3(blocks.parts[i][0], first_factor(min(scale_of(i), kLargestScale)), a, b);
      }
      if (!exists(step, i / Keys::kBlocks)) continue;
      *chunk_of(i, 0) = a;
      *chunk_of(i, 1) = b;
    }
    if (large) {
      for (int i = 0; i < Blocks::kCount; ++i) {
        const uint32_t scale = scale_of(i);
        if (!exists(step, i / Keys::kBlocks) || scale <= kLargestScale) continue;
        multiply_chunk(*chunk_of(i, 0), second_factor(scale));
        multiply_chunk(*chunk_of(i, 1), second_factor(scale));
      }
    }
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if (exists(step, i)) ptx::mbarrier_arrive(address(memory.full, unit(step, i)));
    }
  }

  __device__ __forceinline__ void next(int step, int steps, Blocks& blocks, Blocks& following) {
    bool large = false;
    if constexpr (kRope) {
#pragma unroll
      for (auto& pieces : blocks.parts) {
        split_pairs(pieces[0], pieces[1]);
        ptx::pin_registers(pieces[0], pieces[1]);
      }
    } else {
      large = __any_sync(kAllLanes, blocks.scale > kLargestScale);
    }
    wait(step);
    if (step + 1 < steps) load(step + 1, following);
    write(step, blocks, large);
  }

  __device__ __forceinline__ void gather() {
    const int steps = (own.blocks + Blocks::kCount - 1) / Blocks::kCount;
    Blocks even, odd;
    if (steps > 0) load(0, even);
    for (int step = 0; step < steps; step += 2) {
      next(step, steps, even, odd);
      if (step + 1 == steps) break;
      next(step + 1, steps, odd, even);
    }
  }
};

// A consuming warpgroup: the fold over kCount units, whose products are all under way while the first is added. Every
// warp has the totals of all heads, head l % kHeads in lane l.
template <int kHeads, int kCount, typename Memory>
__device__ __forceinline__ void fold_together(Memory& memory, int first, int group, float (&output)[kHeads / 2],
                                              Total& total) {
  const int head = threadIdx.x % min(kHeads, kWarp);
  const auto stage_of = [&](int i) { return (first + i) % Memory::kDepth; };
  const auto weights_of = [&](int i) {
    return memory.weights[stage_of(i)] + group * (kHeads / 8 * kHandedBytes);
  };
  float parts[kCount][kHeads / 2];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    ptx::mbarrier_wait(ptx::shared_address(memory.full + stage_of(i)), (first + i) / Memory::kDepth & 1);
  }
  ptx::fence_async_proxy();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    multiply_weights<kHeads, kHandedBytes>(ptx::shared_address(memory.keys[stage_of(i)]),
                                           ptx::shared_address(weights_of(i)), 0, parts[i]);
  }
  Step own[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float2 of_unit = *totals_of(weights_of(i), head);
    own[i] = total.add(of_unit.x, of_unit.y);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    wait_for_slab(kCount - 1 - i);
    ptx::pin_registers(parts[i]);
    ptx::mbarrier_arrive(ptx::shared_address(memory.empty + stage_of(i)));
    const Steps<kHeads> steps(own[i]);
    if (steps.rescale) rescale_output<kHeads>(output, steps);
    add_output<kHeads>(output, parts[i], steps);
  }
}

// All units, kTogether or what is left at a time. A branch around the products of some would make ptxas serialise all.
template <int kHeads, int kTogether, typename Memory>
__device__ __forceinline__ void fold_units(Memory& memory, int units, int group, float (&output)[kHeads / 2],
                                           Total& total) {
  static_assert(kTogether == 2 || kTogether == 4);
#pragma unroll
  for (int i = 0; i < kHeads / 2; ++i) output[i] = 0.0f;
  int first = 0;
  for (; first + kTogether <= units; first += kTogether) {
    fold_together<kHeads, kTogether>(memory, first, group, output, total);
  }
  if (kTogether == 4 && units - first >= 2) {
    fold_together<kHeads, 2>(memory, first, group, output, total);
    first += 2;
  }
  if (first < units) fold_together<kHeads, 1>(memory, first, group, output, total);
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace dsv4

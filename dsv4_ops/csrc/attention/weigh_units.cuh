// The first of the two kernels of sparse_attention_split.cu: the weights of units of keys.
//
// A CTA owns a tile of kHeads heads and some units of a row. The first warpgroup, or two of them with half of the heads
// each, has scores and weights; the last two are producers, each warp with eight keys of a unit (as in producer.cuh). A
// unit passes in parts of two slabs through a ring of kSlots, so that the scores of a part are computed while the next
// one is unpacked, and so that a CTA takes less than half of an SM, with room for one of the second kernel: its
// registers, too, are half of what there is, which is one block of keys on the way to a producer, loaded when the one
// before is unpacked, while that is weighed.
//
// Shared memory: a ring of 2 parts of 16 KB for 64 heads, else of 4; queries kHeads KB; 32 bytes a head of what warps
// exchange.
#pragma once

#include "attention/handed_units.cuh"
#include "attention/products.cuh"

namespace dsv4 {

constexpr int kPartSlabs = 2;
constexpr int kParts = kSlabs / kPartSlabs;  // of a unit
constexpr int kPartBytes = kPartSlabs * kSlabBytes;

template <int kHeads>
struct WeighRoles {
  static constexpr int kGroups = kHeads == 8 ? 1 : 2, kHeadsOfGroup = kHeads / kGroups;
  static constexpr int kThreads = (kGroups + 2) * kWarpgroup, kProducerWarps = 8;
  static constexpr int kFirstRegisters = 65536 / (2 * kThreads) / 8 * 8;  // at the start of the kernel
  static constexpr int kConsumerRegisters = kGroups == 1 ? kFirstRegisters : 56;
  static constexpr int kProducerRegisters = kGroups == 1 ? kFirstRegisters : 72;
  static_assert(kGroups * kConsumerRegisters + 2 * kProducerRegisters <= (kGroups + 2) * kFirstRegisters);
};

template <int kHeads>
struct WeighMemory {
  static constexpr int kSlots = kHeads == 64 ? 2 : 4;
  static_assert(kParts % kSlots == 0, "a part has the same slot in every unit");
  alignas(1024) uint8_t keys[kSlots][kPartBytes];
  alignas(1024) uint8_t query[kHeads * kDim * 2];  // 8 slabs of [kHeads][128 bytes]
  alignas(16) float largest[kHeads * kWarpsOfGroup];
  alignas(16) float sum[kHeads * kWarpsOfGroup];
  alignas(8) uint64_t full[kSlots];  // mbarriers: the part is written
  uint64_t empty[kSlots];            // the part has been used
  uint64_t valid[2];                 // a bit for each key, of every other unit
};

// How often the slot of a part has been used before.
template <int kSlots>
__device__ __forceinline__ int uses_before(int unit, int part) {
  return unit * (kParts / kSlots) + part / kSlots;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A producing warp: its keys of one unit after the other.
template <typename Memory, int kWarps>
__device__ __forceinline__ void produce_parts(const KeySources& sources, const RowKeys& row, Memory& memory,
                                              const WarpKeys<kWarps>& own, Lookups lookups) {
  static_assert(WarpKeys<kWarps>::kBlocks == 1, "a warp has one block of a unit");
  constexpr int kBatch = WarpKeys<kWarps>::kBatch, kSlots = Memory::kSlots;
  const int lane = threadIdx.x % kWarp, column = lane / 4, quarter = lane % 4, key = own.warp * kBlock + column;
  const uint32_t full = ptx::shared_address(memory.full), empty = ptx::shared_address(memory.empty);
  const uint32_t first_chunk = chunk_offset(key, 2 * quarter), second_chunk = chunk_offset(key, 2 * quarter + 1);
  KeyPlace ready{};
  uint32_t present = 0;  // of the keys in `ready`
  for (int unit = 0; unit < own.blocks; ++unit) {
    const int place = unit % kBatch * kBlock;
    if (place == 0) {
      ready = lookups.upcoming.place(sources, row);
      present = __ballot_sync(kAllLanes, lookups.upcoming.entry >= 0);
    }
    const KeyPlace from{from_lane(ready.data, place + column), from_lane(ready.scales, place + column)};
    uint4 loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) loaded[i] = load_part(from, i, quarter);
    const uint2 scales = ptx::load_global_8(from.scales);
    if (place == 0 && unit + kBatch < own.blocks) {
      lookups.find_pages(sources, row, own, unit / kBatch + 1);
      lookups.find_entries(sources, row, own, unit / kBatch + 2);
    }
    __syncwarp();  // keeps ptxas from moving the loads to where they are used
    const bool large = __any_sync(kAllLanes, large_scales(scales));
    const auto scale_of = [&](int slab) { return __byte_perm(scales.x, scales.y, 0x4440 + slab) & 0xFF; };
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int slot = part % kSlots, uses = uses_before<kSlots>(unit, part);
      if (uses > 0) ptx::mbarrier_wait(empty + 8 * slot, (uses - 1) & 1);
      if (part == 0 && lane == 0) {
        reinterpret_cast<uint8_t*>(memory.valid + unit % 2)[own.warp] = static_cast<uint8_t>(present >> place);
      }
#pragma unroll
      for (int i = 0; i < kPartSlabs; ++i) {
        const int slab = part * kPartSlabs + i;
        uint4 a, b;
        if (slab < kSlabs - 1) {
          unpack_e4m3(loaded[slab], first_factor(min(scale_of(slab), kLargestScale)), a, b);
        } else {
          a = loaded[kLoads - 2];
          b = loaded[kLoads - 1];
          split_pairs(a, b);
        }
        uint8_t* const keys = memory.keys[slot] + i * kSlabBytes;
        *reinterpret_cast<uint4*>(keys + first_chunk) = a;
        *reinterpret_cast<uint4*>(keys + second_chunk) = b;
      }
      if (large) {
        for (int i = 0; i < kPartSlabs; ++i) {
          const int slab = part * kPartSlabs + i;
          const uint32_t scale = scale_of(slab);
          if (slab == kSlabs - 1 || scale <= kLargestScale) continue;
          uint8_t* const keys = memory.keys[slot] + i * kSlabBytes;
          multiply_chunk(*reinterpret_cast<uint4*>(keys + first_chunk), second_factor(scale));
          multiply_chunk(*reinterpret_cast<uint4*>(keys + second_chunk), second_factor(scale));
        }
      }
      ptx::mbarrier_arrive(full + 8 * slot);
    }
  }
}

// A consuming warpgroup: scores of a unit, number `unit` of this CTA, and the heads whose queries start at `query`. The
// slot of a part is handed back when the products of the next are under way.
template <int kHeads, int kCount, int kPart = 0>
__device__ __forceinline__ void score_parts(WeighMemory<kHeads>& memory, uint32_t query, int unit,
                                            float (&scores)[kCount]) {
  constexpr int kSlots = WeighMemory<kHeads>::kSlots, kSlot = kPart % kSlots;
  const uint32_t full = ptx::shared_address(memory.full), empty = ptx::shared_address(memory.empty);
  ptx::mbarrier_wait(full + 8 * kSlot, uses_before<kSlots>(unit, kPart) & 1);
  ptx::fence_async_proxy();
  multiply_slabs<2 * kCount, kPart * kPartSlabs, (kPart + 1) * kPartSlabs, kHeads>(
      ptx::shared_address(memory.keys[kSlot]), query, scores);
  if constexpr (kPart > 0) {
    ptx::wgmma_wait<1>();
    ptx::mbarrier_arrive(empty + 8 * ((kPart - 1) % kSlots));
  }
  if constexpr (kPart < kParts - 1) {
    score_parts<kHeads, kCount, kPart + 1>(memory, query, unit, scores);
  } else {
    ptx::wgmma_wait<0>();
    ptx::pin_registers(scores);
    ptx::mbarrier_arrive(empty + 8 * kSlot);
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace dsv4

// Shared memory of add_units_kernel in sparse_attention_split.cu.
#pragma once

#include "attention/output.cuh"
#include "attention/producer.cuh"

namespace dsv4 {

constexpr int kAddThreads = 3 * kWarpgroup;                       // of a slab
constexpr int kHandedBytes = kUnit * 8 * 2 + 8 * sizeof(float2);  // of a unit and 8 heads, from one kernel to the other

// What those who work on a slab share. kHeads of a consuming warpgroup, kGroups of those.
template <int kHeads, int kGroups>
struct SlabMemory {
  static constexpr int kAll = kHeads * kGroups;
  static constexpr int kGatherWarps = kAddThreads / 32 - 4 * kGroups;
  static_assert(kUnit % (kGatherWarps * 8) == 0, "whole blocks of a warp in a unit");
  static constexpr int kDepth = kAll == 64 ? 6 : kAll == 32 ? 8 : 10;  // stages
  struct Stage {
    alignas(1024) uint8_t keys[kSlabBytes];
    alignas(128) uint8_t weights[kAll / 8 * kHandedBytes];
  };
  Stage* stages;
  float* reciprocals;
  uint64_t* full;
  uint64_t* empty;
};

// Of a CTA, which has kCtaSlabs slabs.
template <int kHeads, int kGroups, int kCtaSlabs>
struct AddMemory {
  using Slab = SlabMemory<kHeads, kGroups>;
  typename Slab::Stage stages[kCtaSlabs][Slab::kDepth];
  alignas(16) uint8_t staging[kGroups][kHeads * kStagingStride<kSlab * kCtaSlabs>];
  float reciprocals[kCtaSlabs][Slab::kAll];
  alignas(8) uint64_t full[kCtaSlabs][Slab::kDepth];
  uint64_t empty[kCtaSlabs][Slab::kDepth];

  __device__ __forceinline__ Slab of_slab(int own) {
    return {stages[own], reciprocals[own], full[own], empty[own]};
  }
};

}  // namespace dsv4

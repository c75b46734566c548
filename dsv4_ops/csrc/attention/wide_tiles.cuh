// What the warpgroups of sparse_attention_wide.cu share: tiles of keys in shared memory, and who hands what to whom.
//
// Unit number u of a row lies in stage u % 2. Consuming warpgroup w computes the scores of the units of stage w, and of
// every unit the output of dimensions 256 * w .. 256 * w + 255, its half. Half of the producing warps write each half.
//
// All hand-overs are mbarriers at which every thread that has touched the memory arrives:
//
//   full[stage][part]   producers -> the warpgroup of the stage
//   empty[stage][part]  the warpgroup of the half -> producers
//   weighed[stage]      the warpgroup of the stage -> the other one: weights of the unit
//   queries             both warpgroups -> both: queries of a row
//
// Keys, queries and weights are read by wgmma, in the asynchronous proxy: who waits for keys or queries passes a fence
// before it reads them, or lets others read them. Whoever writes does not: the fence waits for all of a thread's loads,
// and producers always have some under way.
//
// A part is two slabs, so that a tile is filled again while the rest of it is still multiplied. That covers the rest:
// weights of a unit are written once all of the tile is full again, hence after the other warpgroup, which read the
// weights before, handed its half back.
#pragma once

#include "attention/attention.h"
#include "attention/softmax.cuh"
#include "attention/tile.cuh"
#include "common/ptx_sm90.cuh"
#include "common/ptx_sm90_attention.cuh"

namespace dsv4::wide {

constexpr int kHeads = 64;
constexpr int kStages = 2;
constexpr int kHalfSlabs = kSlabs / 2;
constexpr int kSlabBytes = kUnit * kRowBytes;  // of keys, and of queries: there are as many
constexpr int kTileBytes = kSlabs * kSlabBytes;
constexpr int kPartSlabs = 2;  // that are handed over together
constexpr int kParts = kSlabs / kPartSlabs;
constexpr int kHalfParts = kParts / 2;
static_assert(kHeads == kUnit);

#ifndef PW
#define PW 4
#endif
constexpr int kProducerWarps = PW;
constexpr int kWarpKeys = kUnit / kProducerWarps;  // of a warp in a tile
constexpr int kBlock = 8;                          // keys of a warp at a time
constexpr int kBlocks = kWarpKeys / kBlock;        // of a warp in a tile
constexpr int kConsumers = 2 * kWarpgroup, kProducers = kProducerWarps * kWarp;
constexpr int kThreads = kConsumers + kProducers;

// Named barriers; 0 is __syncthreads.
__device__ __forceinline__ constexpr int warpgroup_barrier(int own) { return 1 + own; }

// The mbarriers of all hand-overs. Racecheck does not follow named barriers at which one side only arrives.
struct HandOvers {
  uint64_t full_barriers[kStages][kParts], empty_barriers[kStages][kParts], weighed_barriers[kStages];
  uint64_t queries_barrier;

  // By one thread, before all others use them.
  __device__ __forceinline__ void init() {
    for (int stage = 0; stage < kStages; ++stage) {
      for (int part = 0; part < kParts; ++part) {
        ptx::mbarrier_init(full(stage, part), kProducers);
        ptx::mbarrier_init(empty(stage, part), kWarpgroup);
      }
      ptx::mbarrier_init(weighed(stage), kWarpgroup);
    }
    ptx::mbarrier_init(queries(), kConsumers);
  }
  __device__ __forceinline__ uint32_t full(int stage, int part) const {
    return ptx::shared_address(&full_barriers[stage][part]);
  }
  __device__ __forceinline__ uint32_t empty(int stage, int part) const {
    return ptx::shared_address(&empty_barriers[stage][part]);
  }
  __device__ __forceinline__ uint32_t weighed(int stage) const { return ptx::shared_address(&weighed_barriers[stage]); }
  __device__ __forceinline__ uint32_t queries() const { return ptx::shared_address(&queries_barrier); }
};

// A barrier that one side waits at again and again, phase by phase.
struct Phase {
  uint32_t parity = 0;

  __device__ __forceinline__ void wait(uint32_t barrier) {
    ptx::mbarrier_wait(barrier, parity);
    parity ^= 1;
  }
};

// A unit as its warpgroup hands it to both: each thread's part of the weights, and of its two heads the largest score
// and the sum of the weights.
struct Weighed {
  uint4 weights[kUnit / 16][kWarpgroup];
  float4 totals[kWarpgroup];
};

// Where a key lies, and the scales of its groups.
struct FoundKey {
  const uint8_t* data;
  uint2 scales;
};

struct SharedMemory {
  alignas(1024) uint8_t keys[kStages * kTileBytes];
  alignas(1024) uint8_t query[kTileBytes];
  Weighed weighed[kStages];
  alignas(16) FoundKey found[kProducerWarps][kWarp];
  alignas(8) uint8_t valid[kStages][8];  // a bit for each key
  HandOvers hand_overs;
};
static_assert(sizeof(SharedMemory) <= 227 * 1024, "what a CTA can have");

}  // namespace dsv4::wide

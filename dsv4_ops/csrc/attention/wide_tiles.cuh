// What the warps of sparse_attention_wide.cu share: tiles of keys in shared memory, and who hands what to whom.
//
// The units of a CTA's rows are numbered through, one tile each: unit t lies in stage t % 2. Consuming warpgroup w
// computes the scores of the units of stage w, and of every unit the output of dimensions 256 * w .. 256 * w + 255, its
// half. All hand-overs are mbarriers at which every thread arrives that has touched the memory:
//
//   full[stage][part]   producers -> the warpgroup of the stage
//   empty[stage][part]  the warpgroup of the half -> producers
//   weighed[stage]      the warpgroup of the stage -> the other one: weights of the unit
//   queries             both warpgroups -> both: queries of a row
//
// A part is two slabs, so that a tile is filled again while the rest of it is still multiplied. That covers the rest:
// weights of a unit are written once all of the tile is full again, hence after the other warpgroup, which read the
// weights before, handed its half back.
//
// Keys and queries are read by wgmma, through the asynchronous proxy. Who waits for them passes a fence before it reads
// them or lets the other warpgroup do so. Who writes them does not: that fence waits for the loads of its thread, and
// producers always have some under way.
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

constexpr int kConsumers = 2 * kWarpgroup, kProducers = 2 * kWarpgroup;
constexpr int kThreads = kConsumers + kProducers;
constexpr int kWarpKeys = kUnit / (kProducers / kWarp);  // of a producing warp in a tile

constexpr int kConsumerRegisters = 192, kProducerRegisters = 64;  // of a thread
static_assert(2 * kConsumerRegisters + 2 * kProducerRegisters <= 4 * (65536 / kThreads));

// How units are added up. Apart: each relative to its own largest score, its output from zero, then added by an FMA
// (softmax.cuh): the bits do not depend on who computes the unit. Running: relative to the reference that the units so
// far have raised, its output added by the tensor cores; the weights of a head are summed up in each lane apart, and
// the lanes' sums at the end of the row.
enum class Fold { kApart, kRunning };

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
        // The last one has the rope slab: each thread also arrives when its copies have.
        ptx::mbarrier_init(full(stage, part), part == kParts - 1 ? 2 * kProducers : kProducers);
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

  // Wait until a part of the tile of unit number `unit` may be written.
  __device__ __forceinline__ void wait_empty(uint32_t unit, int part) const {
    if (unit >= kStages) ptx::mbarrier_wait(empty(unit % kStages, part), (unit / kStages - 1) & 1);
  }
};

// A barrier that one side waits at again and again, phase by phase.
struct Phase {
  uint32_t parity = 0;

  __device__ __forceinline__ void wait(uint32_t barrier) {
    ptx::mbarrier_wait(barrier, parity);
    parity ^= 1;
  }
};

// Where a key lies, and the scales of its groups.
struct FoundKey {
  const uint8_t* data;
  uint2 scales;
};

// Of a producing warp: its keys of a few tiles, found, and those of the next ones on their way (wide_keys.cuh).
struct WarpKeys {
  FoundKey found[kWarp];
  int32_t entries[kWarp], pages[kWarp];
};

// A unit as its warpgroup hands it to both: each thread's part of the weights, and of its two heads the largest score
// and the sum of the weights.
struct Weighed {
  uint4 weights[kUnit / 16][kWarpgroup];
  float4 totals[kWarpgroup];
};

constexpr int kStagedBytes = 8 * kRowBytes;  // of a warp: a slab of 8 heads

struct SharedMemory {
  alignas(1024) uint8_t keys[kStages * kTileBytes];
  alignas(1024) uint8_t query[kTileBytes];
  Weighed weighed[kStages];
  alignas(128) uint8_t output[kConsumers / kWarp][kStagedBytes];
  alignas(16) WarpKeys warp_keys[kProducers / kWarp];
  alignas(8) uint8_t valid[kStages][kUnit / 8];  // a bit for each key
  HandOvers hand_overs;
};
static_assert(sizeof(SharedMemory) <= 227 * 1024, "what a CTA can have");

}  // namespace dsv4::wide

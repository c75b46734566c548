// The consuming warpgroups of sparse_attention_wide.cu: queries, scores, weights, output sums.
//
// Heads lie on the outer dimension of both products, so a thread has two heads, row and row + 8 of the layout of
// ptx::wgmma, and shares them with the three other lanes of its quad: largest score and sum of weights need two
// shuffles and no barrier, and the weights are operands of the second product as they lie in registers. The arithmetic
// is that of softmax.cuh and products.cuh, with the same order of sums.
#pragma once

#include "attention/keys.cuh"
#include "attention/output.cuh"
#include "attention/wide_output.cuh"
#include "attention/wide_tiles.cuh"
#include "common/ptx.cuh"
#include "common/ptx_sm90_wgmma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
namespace dsv4::wide {

// scores [64 heads, 64 keys] = queries . keys of the tile of a stage over slabs kFirst .. kEnd - 1, added to what is
// there if kFirst > 0. Waits for a part of the tile where it gets there.
template <int kFirst, int kEnd>
__device__ __forceinline__ void multiply_slabs(const SharedMemory& memory, int stage, uint32_t parity,
                                               float (&scores)[32]) {
  const uint64_t a = ptx::wgmma_descriptor(ptx::shared_address(memory.query), 16, 1024, true);
  const uint64_t b = ptx::wgmma_descriptor(ptx::shared_address(memory.keys) + stage * kTileBytes, 16, 1024, true);
  ptx::pin_registers(scores);
#pragma unroll
  for (int slab = kFirst; slab < kEnd; ++slab) {
    const bool new_part = slab % kPartSlabs == 0;
    if (new_part) {
      ptx::mbarrier_wait(memory.hand_overs.full(stage, slab / kPartSlabs), parity);
      ptx::fence_async_proxy();
    }
    if (new_part || slab == kFirst) ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSlab / 16; ++step) {
      const int bytes = slab * kSlabBytes + step * 32;
      ptx::wgmma<kUnit, false, false>(scores, ptx::advance_descriptor(a, bytes), ptx::advance_descriptor(b, bytes),
                                      slab + step > 0);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::pin_registers(scores);
}

// Weights exp2(score - reference) of a unit, in the registers of the scores. What they are relative to is refer(head,
// largest score of the unit).
template <typename Refer>
__device__ __forceinline__ void weigh(float (&scores)[32], uint64_t valid, Refer refer, OfHeads& reference) {
  const int lane = threadIdx.x % kWarp;
  if (valid != ~uint64_t{0}) {
    const uint64_t mine = valid >> lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 32; ++i) scores[i] = mine >> (i / 4 * 8 + i % 2) & 1 ? scores[i] : -INFINITY;
  }
#pragma unroll
  for (int head = 0; head < 2; ++head) {
    float most[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 8 * i + 2 * head;
      most[i] = fmaxf(fmaxf(scores[at], scores[at + 1]), fmaxf(scores[at + 4], scores[at + 5]));
    }
    float value = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
    value = refer(head, fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2)) * kScoreScale);
    reference.value[head] = value;
    const float offset = value == -INFINITY ? 0.0f : -value;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& score = scores[i / 2 * 4 + 2 * head + i % 2];
      score = ptx::ex2_approx_ftz(__fmaf_rn(score, kScoreScale, offset));
    }
  }
}

// The sum of each head's weights in the order of sparse_attention.cu. With key = 16 * block + 8 * i + place: i first,
// then places 4, 2 and 1 apart, then blocks 0 + 1, 2 + 3 and both. A lane has places 2 * (lane % 4) and the next one.
// Lanes share out the blocks as they go.
__device__ __forceinline__ OfHeads sum_of_heads(const float (&weights)[32]) {
  OfHeads sum;
  const int lane = threadIdx.x % kWarp;
  const bool upper = lane & 2, odd = lane & 1;
#pragma unroll
  for (int head = 0; head < 2; ++head) {
    float sums[4][2];
#pragma unroll
    for (int block = 0; block < 4; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = 8 * block + 2 * head + i;
        sums[block][i] = __fadd_rn(weights[at], weights[at + 4]);
      }
    }
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float low = sums[block][i], high = sums[2 + block][i];
        const float kept = upper ? high : low, sent = upper ? low : high;
        sums[block][i] = __fadd_rn(kept, __shfl_xor_sync(kAllLanes, sent, 2));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float kept = odd ? sums[1][i] : sums[0][i], sent = odd ? sums[0][i] : sums[1][i];
      sums[0][i] = __fadd_rn(kept, __shfl_xor_sync(kAllLanes, sent, 1));
    }
    float value = __fadd_rn(sums[0][0], sums[0][1]);
    value = __fadd_rn(value, __shfl_xor_sync(kAllLanes, value, 1));
    sum.value[head] = __fadd_rn(value, __shfl_xor_sync(kAllLanes, value, 2));
  }
  return sum;
}

// The sum of those that this lane has.
__device__ __forceinline__ OfHeads sum_of_lane(const float (&weights)[32]) {
  OfHeads sum;
#pragma unroll
  for (int head = 0; head < 2; ++head) {
    float sums[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] = weights[4 * i + 2 * head] + weights[4 * i + 2 * head + 1];
    sum.value[head] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  }
  return sum;
}

// How far a warpgroup is: the tiles of its own stage, the weights of the other one's, and queries.
struct Phases {
  Phase full, weighed, queries;
};

// Scores to weights for the unit in stage `own`, for both warpgroups. `totals` are those of the units before this pair,
// of which this unit is the second if `second`.
template <Fold kFold, typename Queries>
__device__ __forceinline__ void weigh_unit(const Queries& queries, SharedMemory& memory, int own, bool second,
                                           const RunningTotal (&totals)[2], Phases& phases) {
  float scores[32];
  queries.multiply(memory, own, phases.full.parity, scores);
  phases.full.parity ^= 1;
  OfHeads reference, sum;
  const uint64_t valid = *reinterpret_cast<const uint64_t*>(memory.valid[own]);
  if constexpr (kFold == Fold::kApart) {
    weigh(scores, valid, [](int, float largest) { return largest; }, reference);
    sum = sum_of_heads(scores);
  } else {
    float before[2] = {totals[0].reference, totals[1].reference};
    if (second) {
      phases.weighed.wait(memory.hand_overs.weighed(1 - own));
      const float4 first = memory.weighed[1 - own].totals[threadIdx.x % kWarpgroup];
      before[0] = first.x;
      before[1] = first.y;
    }
    const auto raise = [&](int head, float largest) {
      raise_reference(before[head], largest);
      return before[head];
    };
    weigh(scores, valid, raise, reference);
    sum = sum_of_lane(scores);
  }
  const int thread = threadIdx.x % kWarpgroup;
  Weighed& weighed = memory.weighed[own];
#pragma unroll
  for (int i = 0; i < kUnit / 16; ++i) {
    const float* const eight = scores + 8 * i;
    weighed.weights[i][thread] = {pack_bf16(eight[0], eight[1]), pack_bf16(eight[2], eight[3]),
                                  pack_bf16(eight[4], eight[5]), pack_bf16(eight[6], eight[7])};
  }
  weighed.totals[thread] = {reference.value[0], reference.value[1], sum.value[0], sum.value[1]};
  ptx::mbarrier_arrive(memory.hand_overs.weighed(own));
}

// Half of the output of 64 heads, not yet divided: of each part of it, sums as ptx::wgmma lays them out.
struct Output {
  static constexpr int kPartDims = kPartSlabs * kSlab;
  float sums[kHalfParts][kPartDims / 2];
  RunningTotal totals[2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int part = 0; part < kHalfParts; ++part) {
#pragma unroll
      for (int i = 0; i < kPartDims / 2; ++i) sums[part][i] = 0.0f;
    }
    totals[0] = totals[1] = RunningTotal();
  }

  __device__ __forceinline__ void sum_lanes() {
#pragma unroll
    for (RunningTotal& total : totals) {
      total.sum += __shfl_xor_sync(kAllLanes, total.sum, 1);
      total.sum += __shfl_xor_sync(kAllLanes, total.sum, 2);
    }
  }

  __device__ __forceinline__ void rescale(float first, float second) {
    if (!__any_sync(kAllLanes, first != 1.0f || second != 1.0f)) return;
#pragma unroll
    for (int part = 0; part < kHalfParts; ++part) {
#pragma unroll
      for (int i = 0; i < kPartDims / 2; ++i) {
        sums[part][i] = __fmul_rn(sums[part][i], i / 2 % 2 == 0 ? first : second);
      }
    }
  }

  // Add the unit that lies in `stage`, and hand its half of the tile back, part by part.
  template <Fold kFold>
  __device__ __forceinline__ void add(SharedMemory& memory, int stage, int half) {
    const uint32_t keys = ptx::shared_address(memory.keys) + stage * kTileBytes + half * kHalfSlabs * kSlabBytes;
    const Weighed& weighed = memory.weighed[stage];
    const int thread = threadIdx.x % kWarpgroup;
    uint32_t weights[kUnit / 16][4];
#pragma unroll
    for (int i = 0; i < kUnit / 16; ++i) {
      const uint4 words = weighed.weights[i][thread];
      weights[i][0] = words.x, weights[i][1] = words.y, weights[i][2] = words.z, weights[i][3] = words.w;
    }
    const float4 unit = weighed.totals[thread];
    const auto hand_back = [&](int part) {
      ptx::mbarrier_arrive(memory.hand_overs.empty(stage, half * kHalfParts + part));
    };
    static_assert(kHalfParts == 2);
    if constexpr (kFold == Fold::kRunning) {
      rescale(totals[0].move_reference(unit.x, unit.z), totals[1].move_reference(unit.y, unit.w));
#pragma unroll
      for (int part = 0; part < kHalfParts; ++part) ptx::pin_registers(sums[part]);
      ptx::wgmma_fence();
#pragma unroll
      for (int part = 0; part < kHalfParts; ++part) start(sums[part], weights, keys, part * kPartDims, true);
      ptx::wgmma_wait<1>();
      hand_back(0);
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int part = 0; part < kHalfParts; ++part) ptx::pin_registers(sums[part]);
      hand_back(1);
    } else {
      const Step steps[2] = {totals[0].add(unit.x, unit.z), totals[1].add(unit.y, unit.w)};
      rescale(steps[0].before, steps[1].before);
      float of_slab[kSlab / 2];
#pragma unroll
      for (int slab = 0; slab < kHalfSlabs; ++slab) {
        ptx::pin_registers(of_slab);
        ptx::wgmma_fence();
        start(of_slab, weights, keys, slab * kSlab, false);
        ptx::wgmma_wait<0>();
        ptx::pin_registers(of_slab);
        if (slab % kPartSlabs == kPartSlabs - 1) hand_back(slab / kPartSlabs);
#pragma unroll
        for (int i = 0; i < kSlab / 2; ++i) {
          float& sum = sums[slab / kPartSlabs][slab % kPartSlabs * (kSlab / 2) + i];
          sum = __fmaf_rn(of_slab[i], steps[i / 2 % 2].unit, sum);
        }
      }
    }
  }

 private:
  // output [64 heads, dimensions first_dim .. of the keys' half] = or += weights . keys, under way
  template <int kCount>
  __device__ __forceinline__ static void start(float (&output)[kCount], const uint32_t (&weights)[kUnit / 16][4],
                                               uint32_t keys, int first_dim, bool accumulate) {
    const uint64_t b = ptx::wgmma_descriptor(keys + first_dim / kSlab * kSlabBytes, kSlabBytes, 1024, true);
#pragma unroll
    for (int step = 0; step < kUnit / 16; ++step) {
      ptx::wgmma_k16_bf16<2 * kCount, true>(output, weights[step], ptx::advance_descriptor(b, step * 2048),
                                            accumulate || step > 0);
    }
    ptx::wgmma_commit();
  }
};

// A consuming warpgroup: all rows of this CTA. `Queries` brings those of a row and tile of heads to shared memory in
// two steps, which all consumers take: copy() while keys are still added, finish() after that, and one arrival of each
// thread at the barrier. It multiplies keys by the queries that are there.
template <Fold kFold, bool kQuantised, typename Queries, typename Operands>
__device__ __forceinline__ void consume_rows(const Operands& operands, const SparseAttention& attention,
                                             SharedMemory& memory, int own) {
  const uint32_t head_tiles = (attention.heads + kHeads - 1) / kHeads;
  const uint32_t work = static_cast<uint32_t>(attention.rows) * head_tiles;
  const auto position = [&](uint32_t tile) { return *position_of(attention.rope, tile / head_tiles); };
  Queries queries;
  const auto copy = [&](uint32_t tile) {
    Queries::copy(operands, tile / head_tiles, tile % head_tiles * kHeads, memory);
  };
  const auto finish = [&](uint32_t tile) {
    queries.finish(operands, tile / head_tiles, tile % head_tiles * kHeads, memory);
  };
  Phases phases;
  uint32_t units_before = 0;  // of the rows before
  copy(blockIdx.x);
  finish(blockIdx.x);
  int next_position = position(blockIdx.x);
  for (uint32_t tile = blockIdx.x; tile < work; tile += gridDim.x) {
    const uint32_t next = min(tile + gridDim.x, work - 1), first_head = tile % head_tiles * kHeads;
    const RowKeys keys = keys_of_row(attention.keys, attention.rope, tile / head_tiles, next_position);
    const int units = units_of_row(keys);
    const OfHeads sinks = sinks_of(attention, first_head);
    next_position = position(next);
    phases.queries.wait(memory.hand_overs.queries());
    ptx::fence_async_proxy();
    Output output;
    output.clear();
    if (units == 0) copy(next);
    for (int first = 0; first < units; first += kStages) {
      const int last = min(first + kStages, units) - 1;
      const int mine = first + ((own ^ (units_before + first)) & 1);
      const bool weighs = mine <= last, second = mine > first;
      if (weighs) weigh_unit<kFold>(queries, memory, own, second, output.totals, phases);
      const bool has_met = kFold == Fold::kRunning && weighs && second;  // has the other's weights
      for (int unit = first; unit <= last; ++unit) {
        const int stage = (units_before + unit) % kStages;
        if (stage != own && !has_met) phases.weighed.wait(memory.hand_overs.weighed(stage));
        if (unit == units - 1) {  // both warpgroups have the scores of all units, but not all warps met since
          ptx::named_barrier(warpgroup_barrier(own), kWarpgroup);
          copy(next);
        }
        output.add<kFold>(memory, stage, own);
      }
    }
    units_before += units;
    finish(next);
    if constexpr (kFold == Fold::kRunning) output.sum_lanes();
    store_output<kQuantised>(attention, output.sums, output.totals, sinks, tile / head_tiles, first_head,
                             keys.position, own, memory);
  }
}

}  // namespace dsv4::wide
#endif  // __CUDA_ARCH_FEAT_SM90_ALL

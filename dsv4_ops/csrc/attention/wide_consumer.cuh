// The consuming warpgroups of sparse_attention_wide.cu: queries, scores, weights, output sums.
//
// Heads lie on the outer dimension of both products, so a thread has two heads, row and row + 8 of the layout of
// ptx::wgmma, and shares them with the three other lanes of its quad: largest score and sum of weights need two shuffles
// and no barrier, and the weights are operands of the second product as they lie in registers. The arithmetic is that of
// softmax.cuh and products.cuh, with the same order of sums.
#pragma once

#include "attention/output.cuh"
#include "attention/wide_tiles.cuh"
#include "common/ptx.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
namespace dsv4::wide {

// The queries of a row for the heads from `first_head` on, on their way to shared memory. All consumers.
struct Queries {
  const __nv_bfloat16* q;  // of the first head
  int64_t stride;
  int heads;  // that exist

  __device__ __forceinline__ Queries(const SparseAttention& attention, int64_t row, int first_head)
      : q(static_cast<const __nv_bfloat16*>(attention.q) + (row * attention.heads + first_head) * attention.q_stride),
        stride(attention.q_stride),
        heads(attention.heads - first_head) {}

  // Start copies of all but the rope slab.
  __device__ __forceinline__ void copy(uint8_t* query) const {
    const int column = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < kHeads; i += kConsumers / 8) {
      const int head = threadIdx.x / 8 + i;
      const __nv_bfloat16* const from = q + min(head, heads - 1) * stride + column * 8;
      uint8_t* const to = query + chunk_offset(head, column);
#pragma unroll
      for (int slab = 0; slab < kNope / kSlab; ++slab) {
        ptx::cp_async_16(to + slab * kSlabBytes, from + slab * kSlab, head < heads ? 16 : 0);
      }
    }
    ptx::cp_async_commit();
  }

  // Sixteen rope dimensions of this thread.
  __device__ __forceinline__ void load_rope(uint4 (&rope)[2]) const {
    static_assert(kConsumers == kHeads * kRopeDim / 16);
    const int head = threadIdx.x / 4;
    const __nv_bfloat16* const from = q + min(head, heads - 1) * stride + kNope + threadIdx.x % 4 * 16;
    rope[0] = head < heads ? ptx::load_once(from) : uint4{0, 0, 0, 0};
    rope[1] = head < heads ? ptx::load_once(from + 8) : uint4{0, 0, 0, 0};
  }
};

// Then the queries lie where wgmma reads them.
__device__ __forceinline__ void finish_queries(uint8_t* query, uint4 (&rope)[2]) {
  const int head = threadIdx.x / 4, chunk = threadIdx.x % 4 * 2;
  uint8_t* const to = query + (kSlabs - 1) * kSlabBytes;
  split_pairs(rope[0], rope[1]);
  *reinterpret_cast<uint4*>(to + chunk_offset(head, chunk)) = rope[0];
  *reinterpret_cast<uint4*>(to + chunk_offset(head, chunk + 1)) = rope[1];
  ptx::cp_async_wait<0>();
  ptx::fence_async_proxy();
  ptx::named_barrier(kConsumersBarrier, kConsumers);
}

// scores [64 heads, 64 keys] += queries . keys over half of the dimensions
__device__ __forceinline__ void multiply_half(uint32_t query, uint32_t keys, int half, float (&scores)[32]) {
  const uint64_t a = ptx::wgmma_descriptor(query, 16, 1024, true), b = ptx::wgmma_descriptor(keys, 16, 1024, true);
#pragma unroll
  for (int step = 0; step < kDim / 32; ++step) {
    const int bytes = (half * kHalfSlabs + step / 4) * kSlabBytes + step % 4 * 32;
    ptx::wgmma<kUnit, false, false>(scores, ptx::advance_descriptor(a, bytes), ptx::advance_descriptor(b, bytes),
                                    half + step > 0);
  }
}

// A pair of values, one for each head of a thread.
struct OfHeads {
  float value[2];
};

// Weights exp2(score - largest) of a unit, in the registers of the scores; the largest score and the sum of each head.
__device__ __forceinline__ void weigh(float (&scores)[32], uint64_t valid, OfHeads& largest, OfHeads& sum) {
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
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2)) * kScoreScale;
    largest.value[head] = value;
    const float offset = value == -INFINITY ? 0.0f : -value;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& score = scores[i / 2 * 4 + 2 * head + i % 2];
      score = ptx::ex2_approx_ftz(__fmaf_rn(score, kScoreScale, offset));
    }
  }
  // With key = 16 * block + 8 * i + place: i first, then places 4, 2 and 1 apart, then blocks 0 + 1, 2 + 3 and both. A
  // lane has places 2 * (lane % 4) and the next one. Lanes share out the blocks as they go.
  const bool upper = lane & 2, odd = lane & 1;
#pragma unroll
  for (int head = 0; head < 2; ++head) {
    float sums[4][2];
#pragma unroll
    for (int block = 0; block < 4; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = 8 * block + 2 * head + i;
        sums[block][i] = __fadd_rn(scores[at], scores[at + 4]);
      }
    }
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float kept = upper ? sums[2 + block][i] : sums[block][i], sent = upper ? sums[block][i] : sums[2 + block][i];
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
}

// Scores to weights for the unit of stage `own`, for both warpgroups.
__device__ __forceinline__ void weigh_unit(SharedMemory& memory, int own) {
  const uint32_t query = ptx::shared_address(memory.query);
  const uint32_t keys = ptx::shared_address(memory.keys) + own * kTileBytes;
  const int thread = threadIdx.x % kWarpgroup;
  float scores[32];
  ptx::pin_registers(scores);
  ptx::named_barrier(full_barrier(own, 0), kHandOverThreads);
  ptx::wgmma_fence();
  multiply_half(query, keys, 0, scores);
  ptx::wgmma_commit();
  ptx::named_barrier(full_barrier(own, 1), kHandOverThreads);
  multiply_half(query, keys, 1, scores);
  ptx::wgmma_commit();
  const uint64_t valid = *reinterpret_cast<const uint64_t*>(memory.valid[own]);
  ptx::wgmma_wait<0>();
  ptx::pin_registers(scores);
  OfHeads largest, sum;
  weigh(scores, valid, largest, sum);
  Weighed& weighed = memory.weighed[own];
#pragma unroll
  for (int i = 0; i < kUnit / 16; ++i) {
    const float* const eight = scores + 8 * i;
    weighed.weights[i][thread] = {pack_bf16(eight[0], eight[1]), pack_bf16(eight[2], eight[3]),
                                  pack_bf16(eight[4], eight[5]), pack_bf16(eight[6], eight[7])};
  }
  weighed.totals[thread] = {largest.value[0], largest.value[1], sum.value[0], sum.value[1]};
  ptx::named_barrier_arrive(weighed_barrier(own), kConsumers);
}

// Half of the output of 64 heads, not yet divided.
struct Output {
  float sums[kHalfSlabs][32];
  Total totals[2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int slab = 0; slab < kHalfSlabs; ++slab) {
#pragma unroll
      for (int i = 0; i < 32; ++i) sums[slab][i] = 0.0f;
    }
    totals[0] = totals[1] = Total();
  }

  // Add the unit that lies in `stage`, and hand its half of the tile back.
  __device__ __forceinline__ void add(const SharedMemory& memory, int stage, int half) {
    const uint32_t keys = ptx::shared_address(memory.keys) + stage * kTileBytes + half * kHalfSlabs * kSlabBytes;
    const Weighed& weighed = memory.weighed[stage];
    const int thread = threadIdx.x % kWarpgroup;
    uint4 weights[kUnit / 16];
#pragma unroll
    for (int i = 0; i < kUnit / 16; ++i) weights[i] = weighed.weights[i][thread];
    const float4 unit = weighed.totals[thread];
    const Step steps[2] = {totals[0].add(unit.x, unit.z), totals[1].add(unit.y, unit.w)};
    if (__any_sync(kAllLanes, steps[0].before != 1.0f || steps[1].before != 1.0f)) {
#pragma unroll
      for (int slab = 0; slab < kHalfSlabs; ++slab) {
#pragma unroll
        for (int i = 0; i < 32; ++i) sums[slab][i] = __fmul_rn(sums[slab][i], steps[i / 2 % 2].before);
      }
    }
    const uint64_t b = ptx::wgmma_descriptor(keys, 16, 1024, true);
    float part[32];
#pragma unroll
    for (int slab = 0; slab < kHalfSlabs; ++slab) {
      ptx::pin_registers(part);
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < kUnit / 16; ++step) {
        ptx::wgmma_64<true>(part, weights[step], ptx::advance_descriptor(b, slab * kSlabBytes + step * 2048), step > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::pin_registers(part);
      if (slab == kHalfSlabs - 1) ptx::named_barrier_arrive(empty_barrier(stage, half), kHandOverThreads);
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        sums[slab][i] = __fmaf_rn(part[i], steps[i / 2 % 2].unit, sums[slab][i]);
      }
    }
  }
};

}  // namespace dsv4::wide
#endif  // __CUDA_ARCH_FEAT_SM90_ALL

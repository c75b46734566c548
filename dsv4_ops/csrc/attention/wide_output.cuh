// From output sums, heads as rows, to rows of `o`: division, inverse rope, rounding, 16 neighbouring bytes of a lane.
#pragma once

#include "attention/output.cuh"
#include "attention/wide_tiles.cuh"

namespace dsv4::wide {

// Four lanes have in words[i] their word of chunk i: lane i gets the words of chunk i.
__device__ __forceinline__ uint4 transpose_in_quad(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  const uint32_t ab = __shfl_xor_sync(kAllLanes, odd ? a : b, 1), cd = __shfl_xor_sync(kAllLanes, odd ? c : d, 1);
  const uint2 low = odd ? uint2{ab, b} : uint2{a, ab};   // chunk 0 or 1, words of this pair of lanes
  const uint2 high = odd ? uint2{cd, d} : uint2{c, cd};  // chunk 2 or 3
  const uint2 sent = upper ? low : high;
  const uint2 got{__shfl_xor_sync(kAllLanes, sent.x, 2), __shfl_xor_sync(kAllLanes, sent.y, 2)};
  return upper ? uint4{got.x, got.y, high.x, high.y} : uint4{low.x, low.y, got.x, got.y};
}

// A slab of output of the thread's head number `head` (0 or 1), to the 64 dimensions at `o` of that head.
__device__ __forceinline__ void store_slab(const float (&sums)[32], int head, float reciprocal, bool exists,
                                           __nv_bfloat16* o) {
  uint32_t words[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float* const two = sums + 4 * i + 2 * head;
    words[i] = pack_bf16(reciprocal > 0 ? two[0] * reciprocal : 0.0f, reciprocal > 0 ? two[1] * reciprocal : 0.0f);
  }
  const uint4 first = transpose_in_quad(words[0], words[1], words[2], words[3]);
  const uint4 second = transpose_in_quad(words[4], words[5], words[6], words[7]);
  if (!exists) return;
  ptx::store(o + threadIdx.x % 4 * 8, first);
  ptx::store(o + 32 + threadIdx.x % 4 * 8, second);
}

// The same for the rope slab, which is turned back: of sixteen dimensions a lane has 4 * (lane % 4) and the three after
// it, in the order 0 2 1 3. `turns` has (cos, sin) of the pairs.
__device__ __forceinline__ void store_rope_slab(const float (&sums)[32], int head, float reciprocal, bool exists,
                                                const float2* turns, __nv_bfloat16* o) {
#pragma unroll
  for (int group = 0; group < kRopeDim / 16; ++group) {
    uint32_t words[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int even = 8 * group + 2 * head + i;
      const float2 turn = __ldg(turns + 8 * group + threadIdx.x % 4 * 2 + i);
      const float2 pair{reciprocal > 0 ? sums[even] * reciprocal : 0.0f,
                        reciprocal > 0 ? sums[even + 4] * reciprocal : 0.0f};
      const float2 turned = rotate(pair, float2{turn.x, -turn.y});
      words[i] = pack_bf16(turned.x, turned.y);
    }
    if (exists) *reinterpret_cast<uint2*>(o + 16 * group + threadIdx.x % 4 * 4) = {words[0], words[1]};
  }
}

// A total to which units are also added that are relative to its own reference.
struct RunningTotal : Total {
  // The unit has raised the reference, or not: what came before is multiplied by the factor returned.
  __device__ __forceinline__ float move_reference(float raised, float unit_sum) {
    const float before = raised == reference ? 1.0f : ptx::ex2_approx_ftz(reference - raised);
    reference = raised;
    sum = __fmaf_rn(sum, before, unit_sum);
    return before;
  }
};

// Divide, turn and store what a consuming warpgroup has of a row.
__device__ __forceinline__ void store_output(const SparseAttention& attention, const float (&sums)[kHalfSlabs][32],
                                             const RunningTotal (&totals)[2], uint32_t row, int first_head,
                                             int position, int half) {
  const int thread = threadIdx.x % kWarpgroup, lane = thread % kWarp;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int head = first_head + thread / kWarp * 16 + lane / 4 + 8 * i;
    const bool exists = head < attention.heads;
    const float reciprocal = finish_head(attention, row, head, totals[i], half == 0 && lane % 4 == 0);
    const int64_t vector = static_cast<int64_t>(row) * attention.heads + head;
    __nv_bfloat16* const o = static_cast<__nv_bfloat16*>(attention.o) + vector * kDim + half * (kDim / 2);
#pragma unroll
    for (int slab = 0; slab < kHalfSlabs - 1; ++slab) {
      store_slab(sums[slab], i, reciprocal, exists, o + slab * kSlab);
    }
    constexpr int kLast = kHalfSlabs - 1;
    if (half == 0) {
      store_slab(sums[kLast], i, reciprocal, exists, o + kLast * kSlab);
    } else {
      const auto* const turns = reinterpret_cast<const float2*>(rope_row(attention.rope.table, kRopeDim, position));
      store_rope_slab(sums[kLast], i, reciprocal, exists, turns, o + kLast * kSlab);
    }
  }
}

}  // namespace dsv4::wide

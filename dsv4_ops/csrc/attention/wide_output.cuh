// From output sums, heads as rows, to rows of `o`: division, inverse rope, rounding; through a warp's shared memory to
// whole lines. Or codes: a lane has 32 of the 128 dimensions that share a scale, and its quad all of
// them.
//
// This is done once a row, while no product is under way, and its instructions are not in the caches: few of them.
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

// (cos, -sin) of the pairs of the rope slab that a lane has: pair 4 * i + lane % 4.
struct Turns {
  float2 inverse[8];

  __device__ __forceinline__ Turns(const Rope& rope, int position) {
    const auto* const turns = reinterpret_cast<const float2*>(rope_row(rope.table, kRopeDim, position));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 turn = __ldg(turns + 4 * i + threadIdx.x % 4);
      inverse[i] = {turn.x, -turn.y};
    }
  }
};

// What a lane of a quad has of a slab of a head, rounded: word i is dimensions 8 * i + 2 * (lane % 4) and the next one.
struct RoundedSlab {
  uint32_t words[8];

  __device__ __forceinline__ RoundedSlab(const float* sums, int head, float reciprocal) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float* const two = sums + 4 * i + 2 * head;
      words[i] = pack_bf16(two[0] * reciprocal, two[1] * reciprocal);
    }
  }

  // Of the rope slab, which is turned back: a word is a pair.
  __device__ __forceinline__ RoundedSlab(const float* sums, int head, float reciprocal, const Turns& turns) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float* const two = sums + 4 * i + 2 * head;
      const float2 turned = rotate(float2{two[0] * reciprocal, two[1] * reciprocal}, turns.inverse[i]);
      words[i] = pack_bf16(turned.x, turned.y);
    }
  }

  // The same times a power of two as E4M3, to 64 bytes: a lane stores sixteen of them.
  __device__ __forceinline__ void store_codes(bool exists, float factor, uint8_t* codes) const {
    uint32_t fours[4];  // two codes of the first eight that a lane has, and two of the next
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float2 low = unpack_bf16x2(words[i]), high = unpack_bf16x2(words[i + 1]);
      fours[i / 2] = encode_e4m3x2(low.x * factor, low.y * factor) |
                     encode_e4m3x2(high.x * factor, high.y * factor) << 16;
    }
    const uint4 own = transpose_in_quad(fours[0], fours[1], fours[2], fours[3]);
    if (!exists) return;
    ptx::store(codes + threadIdx.x % 4 * 16, uint4{low_halves(own.x, own.y), low_halves(own.z, own.w),
                                                   high_halves(own.x, own.y), high_halves(own.z, own.w)});
  }

  __device__ __forceinline__ uint32_t max_magnitude_bits() const {
    const Packed<__nv_bfloat16, 16> all{uint4{words[0], words[1], words[2], words[3]},
                                        uint4{words[4], words[5], words[6], words[7]}};
    return all.max_magnitude_bits();
  }
};

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

// A pair of values, one for each head of a thread.
struct OfHeads {
  float value[2];
};

// Number i of a thread's two heads.
__device__ __forceinline__ int head_of_thread(int first_head, int i) {
  return first_head + threadIdx.x % kWarpgroup / kWarp * 16 + threadIdx.x % kWarp / 4 + 8 * i;
}

__device__ __forceinline__ OfHeads sinks_of(const SparseAttention& attention, int first_head) {
  return {sink_of(attention, head_of_thread(first_head, 0)), sink_of(attention, head_of_thread(first_head, 1))};
}

// Slabs of 8 heads of a warp on their way to `o`: staged, read back as 16 bytes of a head, and stored when the next
// ones are staged, so that nothing waits for shared memory. An instruction stores 128 bytes of four heads: whole lines.
class StagedSlabs {
 public:
  __device__ __forceinline__ explicit StagedSlabs(uint8_t* staging) : staging_(ptx::shared_address(staging)) {}

  // `slab` of a lane is of head lane / 4, `o` of the first head and dimension; the first `heads` exist.
  __device__ __forceinline__ void add(const RoundedSlab& slab, __nv_bfloat16* o, int heads) {
    const int lane = threadIdx.x % kWarp, column = lane % kColumns;
    __syncwarp();  // what was staged before has been read
#pragma unroll
    for (int chunk = 0; chunk < kColumns; chunk += 4) {
      ptx::stmatrix(staging_ + chunk_offset(lane % 8, chunk + lane / 8), slab.words[chunk], slab.words[chunk + 1],
                    slab.words[chunk + 2], slab.words[chunk + 3]);
    }
    __syncwarp();
    uint4 rows[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      rows[i] = ptx::load_shared(staging_ + chunk_offset(i * kStep + lane / kColumns, column));
    }
    store();
#pragma unroll
    for (int i = 0; i < kRows; ++i) rows_[i] = rows[i];
    o_ = o + lane / kColumns * kDim + column * 8;
    heads_ = heads - lane / kColumns;
  }

  // What was added last.
  __device__ __forceinline__ void store() const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) ptx::store_if(o_ + i * kStep * kDim, rows_[i], i * kStep < heads_);
  }

 private:
  static constexpr int kColumns = kSlab / 8, kStep = kWarp / kColumns, kRows = 8 / kStep;

  uint32_t staging_;
  uint4 rows_[kRows];
  __nv_bfloat16* o_ = nullptr;
  int heads_ = 0;
};

// A lane's two slabs of a head that share a scale, as codes.
__device__ __forceinline__ void store_group(const RoundedSlab& first, const RoundedSlab& second, int dim, bool exists,
                                            const Fp8Row<kScaleGroup>& output) {
  static_assert(kScaleGroup == 2 * kSlab);
  const uint32_t bits = max(first.max_magnitude_bits(), second.max_magnitude_bits());
  const uint32_t scale = fp8_group_scale(__uint_as_float(max_lanes<4>(bits)));
  const float factor = invert_ue8m0(scale);
  first.store_codes(exists, factor, output.q + dim);
  second.store_codes(exists, factor, output.q + dim + kSlab);
  if (exists && threadIdx.x % 4 == 0) output.scale[dim / kScaleGroup] = scale;
}

// Divide, turn and store what a consuming warpgroup has of a row.
template <bool kQuantised>
__device__ __forceinline__ void store_output(const SparseAttention& attention,
                                             float (&parts)[kHalfParts][kPartSlabs * 32],
                                             const RunningTotal (&totals)[2], const OfHeads& sinks, uint32_t row,
                                             int first_head, int position, int half, SharedMemory& memory) {
  const int64_t first_vector = static_cast<int64_t>(row) * attention.heads;
  float reciprocal[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int head = head_of_thread(first_head, i);
    const bool stores_lse = half == 0 && threadIdx.x % 4 == 0;
    reciprocal[i] = finish_head(attention, row, head, sinks.value[i], totals[i], stores_lse);
    if (!(reciprocal[i] > 0)) {  // the sums may be NaN
#pragma unroll
      for (int part = 0; part < kHalfParts; ++part) {
#pragma unroll
        for (int j = 0; j < kPartSlabs * 16; ++j) parts[part][j / 2 * 4 + 2 * i + j % 2] = 0.0f;
      }
    }
  }
  const Turns turns(attention.rope, position);
  const auto round = [&](int slab, int i) {
    const float* const sums = parts[slab / kPartSlabs] + slab % kPartSlabs * 32;
    return slab == kHalfSlabs - 1 && half == 1 ? RoundedSlab(sums, i, reciprocal[i], turns)
                                               : RoundedSlab(sums, i, reciprocal[i]);
  };
  const int first_dim = half * (kDim / 2);
  if constexpr (kQuantised) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = head_of_thread(first_head, i);
      const Fp8Row<kScaleGroup> output = quantised_output(attention, first_vector + head);
#pragma unroll
      for (int slab = 0; slab < kHalfSlabs; slab += 2) {
        store_group(round(slab, i), round(slab + 1, i), first_dim + slab * kSlab, head < attention.heads, output);
      }
    }
  } else {
    const int warp = threadIdx.x / kWarp, head = first_head + warp % 4 * 16;
    auto* const o = static_cast<__nv_bfloat16*>(attention.o) + (first_vector + head) * kDim + first_dim;
    StagedSlabs staged(memory.output[warp]);
#pragma unroll
    for (int slab = 0; slab < kHalfSlabs; ++slab) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        staged.add(round(slab, i), o + 8 * i * kDim + slab * kSlab, attention.heads - head - 8 * i);
      }
    }
    staged.store();
  }
}

}  // namespace dsv4::wide

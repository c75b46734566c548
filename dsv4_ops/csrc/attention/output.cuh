// From a warpgroup's sums of output, heads as columns, to rows of `o`: division, inverse rope, rounding, transposition,
// and codes instead of values where those are asked for.
//
// Codes are what quant_fp8 makes of the rounded values, bit for bit. Eight lanes have the 128 dimensions that share a
// scale, so its amax takes three shuffles; that is all that the quantised form adds, and it stores half the bytes.
#pragma once

#include "attention/attention.h"
#include "attention/softmax.cuh"
#include "attention/tile.cuh"
#include "common/ptx_sm90.cuh"
#include "common/ptx_sm90_attention.cuh"
#include "common/quantised_row.cuh"
#include "common/rope.cuh"

namespace dsv4 {

// Rows [kHeads] of bf16 in shared memory, 16 bytes apart from a multiple of 128 so that a column of chunks fills all
// banks.
template <int kWidth>
constexpr int kStagingStride = kWidth * 2 + 16;

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// The turn that a thread's two rows of the rope slab share: warp w and lane l have pair 8 * w + l / 4.
__device__ __forceinline__ float2 inverse_turn(const Rope& rope, int position) {
  const int pair = threadIdx.x % kWarpgroup / kWarp * 8 + threadIdx.x % kWarp / 4;
  const float* const row = rope_row(rope.table, kRopeDim, position);
  const float2 turn = __ldg(reinterpret_cast<const float2*>(row) + pair);
  return {turn.x, -turn.y};
}

// Divide a slab of output by the denominators and turn it back if it is the rope slab.
template <int kHeads>
__device__ __forceinline__ void finish_slab(float (&output)[kHeads / 2], const float (&reciprocal)[kColumns<kHeads>],
                                            bool rope, float2 turn) {
#pragma unroll
  for (int i = 0; i < kHeads / 2; ++i) {
    const float factor = reciprocal[i / 4 * 2 + i % 2];
    output[i] = factor > 0 ? output[i] * factor : 0.0f;
  }
  if (!rope) return;
#pragma unroll
  for (int i = 0; i < kHeads / 2; ++i) {
    if (i % 4 >= 2) continue;
    const float2 turned = rotate(float2{output[i], output[i + 2]}, turn);
    output[i] = turned.x;
    output[i + 2] = turned.y;
  }
}

// Write a slab (64 rows) as columns `first` .. first + 63 of the staging rows.
template <int kHeads, int kWidth>
__device__ __forceinline__ void stage_slab(const float (&output)[kHeads / 2], uint8_t* staging, int first) {
  const int warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
  const auto packed = [&](int block, int half) {
    return pack_bf16(output[4 * block + 2 * half], output[4 * block + 2 * half + 1]);
  };
  const int column = first + 16 * warp + lane / 8 % 2 * 8;
  const uint32_t address = ptx::shared_address(staging) + column * 2;
  if constexpr (kHeads == 8) {
    ptx::stmatrix_transposed(address + lane % 8 * kStagingStride<kWidth>, packed(0, 0), packed(0, 1));
  } else {
#pragma unroll
    for (int block = 0; block < kHeads / 8; block += 2) {
      const int head = (block + lane / 16) * 8 + lane % 8;
      ptx::stmatrix_transposed(address + head * kStagingStride<kWidth>, packed(block, 0), packed(block, 1),
                               packed(block + 1, 0), packed(block + 1, 1));
    }
  }
}

// Codes and scales of the vectors [B, S, H] of a quantised output.
__device__ __forceinline__ Fp8Row<kScaleGroup> quantised_output(const SparseAttention& attention, int64_t vector) {
  Fp8Row<kScaleGroup> row{static_cast<uint8_t*>(attention.o), attention.o_scale};
  row.begin(vector, kDim);
  return row;
}

// Staging rows, as the slabs have them, to dimensions first_dim .. of the vectors from `vector` on, of which `heads`
// exist. Whole warps of a warpgroup, after its barrier. A slab alone is no group, and never quantised.
template <int kHeads, int kWidth>
__device__ __forceinline__ void store_rows(const uint8_t* staging, const SparseAttention& attention, int64_t vector,
                                           int heads, int first_dim) {
  constexpr int kPieces = kWidth / 16;  // of 16 dimensions: two chunks
  for (int i = threadIdx.x % kWarpgroup; i < kHeads * kPieces; i += kWarpgroup) {
    const int head = i / kPieces, piece = i % kPieces, dim = first_dim + piece * 16;
    const auto* const from = reinterpret_cast<const uint4*>(staging + head * kStagingStride<kWidth>) + piece * 2;
    Packed<__nv_bfloat16, 16> values{from[0], from[1]};
    if (dim >= kNope) join_pairs(values.parts[0], values.parts[1]);
    if (kWidth % kScaleGroup == 0 && attention.o_scale != nullptr) {
      store_row(quantised_output(attention, vector + head), dim, values, head < heads);
    } else if (head < heads) {
      values.store(static_cast<__nv_bfloat16*>(attention.o) + (vector + head) * kDim + dim);
    }
  }
}

// A slab of staging rows of a warpgroup, half of the dimensions that share a scale, as codes. The CTA of the other half
// is the other one of a cluster; all consuming threads of both come here. `magnitudes` [kHeads] is read by both.
template <int kHeads>
__device__ __forceinline__ void store_half_groups(const uint8_t* staging, uint32_t* magnitudes,
                                                  const SparseAttention& attention, int64_t vector, int heads,
                                                  int slab) {
  constexpr int kPieces = kSlab / 16;
  static_assert(kHeads * kPieces <= kWarpgroup && kScaleGroup == 2 * kSlab);
  const int head = threadIdx.x % kWarpgroup / kPieces, piece = threadIdx.x % kPieces;
  const bool staged = head < kHeads;  // the same in a warp
  const auto* const from = reinterpret_cast<const uint4*>(staging + (staged ? head : 0) * kStagingStride<kSlab>);
  Packed<__nv_bfloat16, 16> values{from[2 * piece], from[2 * piece + 1]};
  if (slab == kSlabs - 1) join_pairs(values.parts[0], values.parts[1]);
  uint32_t bits = max_lanes<kPieces>(values.max_magnitude_bits());
  if (staged && piece == 0) magnitudes[head] = bits;
  ptx::cluster_arrive();
  ptx::cluster_wait();
  bits = max(bits, ptx::load_of_cta(ptx::shared_address(magnitudes + (staged ? head : 0)), 1 - slab % 2));
  ptx::cluster_arrive();  // and wait at the end: shared memory that is still read must not be given up
  const uint32_t scale = fp8_group_scale(__uint_as_float(bits));
  if (staged && head < heads) {
    Fp8Row<kScaleGroup> output = quantised_output(attention, vector + head);
    float scaled[16];
    uint8_t codes[16];
    values.times_power_of_two(invert_ue8m0(scale)).to_floats(scaled);
    encode_fp8(scaled, 1.0f, codes);
    store_bytes(output.q + slab * kSlab + piece * 16, codes);
    if (slab % 2 == 0 && piece == 0) output.scale[slab / 2] = scale;
  }
  ptx::cluster_wait();
}

// The sink of head number `head`: a parameter of the model.
__device__ __forceinline__ float sink_of(const SparseAttention& attention, int head) {
  return head < attention.heads ? attention.sink[head] : 0.0f;
}

// Head number `head`, by the thread that has its total: the reciprocal of its denominator, and its lse stored.
__device__ __forceinline__ float finish_head(const SparseAttention& attention, int64_t row, int head, float sink,
                                             const Total& total, bool store_lse) {
  if (head >= attention.heads) return 0.0f;
  if (store_lse) attention.lse[row * attention.heads + head] = log_sum_exp(total);
  return reciprocal_of_denominator(total, sink);
}

}  // namespace dsv4

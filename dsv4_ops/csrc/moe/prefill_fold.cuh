// MXFP4 weights on the tensor cores' FP8: the inner loop of prefill_product.cuh where x stays in E4M3.
//
// An E2M1 code times 2^s is an E4M3 code for s from -5 to 6, so the scales of a row fold into its codes as long as they
// lie within 11 powers of two. A thread keeps the sums of a row in units of 2^(base - 133). base is raised, and the
// sums are scaled down, where a larger scale comes; it takes a margin of four, so that this happens about once a tile.
// Whether all scales of a stage (128 columns) fit is asked of the whole warpgroup, when the stage comes. Where they do
// not, it is multiplied once for every window of scales that one of its rows has, each time with the codes of all
// others zero: operands are exact whatever the scales, and nothing has to be known of the weights beforehand.
//
// FP8 wgmma keeps 13 bits of the largest product (and sum) of 32, so the sums of a stage are taken by themselves, of up
// to 64 rows of the block at a time, and are added to the accumulators in fp32, times the scale of x:
//
//   decode    two rows of a matrix: a table of eight codes for each (two products of s), a byte permutation for four
//             codes, eight instructions for eight
//   multiply  4 wgmma m64n<up to 64>k32; the next matrix, or the first one of the next stage, is decoded meanwhile
//   add       a multiplication-addition a sum and stage, and a load of x's scales for each two columns
//
// What bounds it, in cycles of an SM for a stage and a block of n rows: tensor cores 8n, half of the 16-bit product;
// L2, 16 KB of weights and 128n bytes of rows. A scheduler issues about 2 x (250 + 2n) instructions, of which the 2 x
// 180 of decoding take two cycles each: as long as the tensor cores for blocks of 90 rows, longer for smaller ones.
//
// Floor of moe_mxfp4 on 32 experts of 4096 x 2048 and 1024 tokens on an H200: 160 us for 309 GFLOP, 90 us for 430 MB.
// H200, 2026-11-25, us warm (16-bit products): those 598 (663), 256 experts 1407 (1768), 48 experts of 7168 x 3072 1320
// (1518). Blocks have about 96 rows there and less, so decoding bounds it, and no warpgroup multiplies while it adds.
#pragma once

#include "moe/prefill_copies.cuh"

namespace dsv4 {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr uint32_t kFoldSpan = 11;   // scales from base - 11 to base
constexpr uint32_t kFoldMargin = 4;  // of a new base above its scale
constexpr int kFoldSteps = 4;        // of 32 columns, in a stage

// The eight magnitudes of E2M1 times 2^(above - 5) as E4M3.
struct FoldTable {
  uint32_t low, high;

  __device__ __forceinline__ explicit FoldTable(uint32_t above)
      : low(0x14100800u + above * 0x08080800u), high(0x24201C18u + above * 0x08080808u) {}
};

// The first operand of the four steps for a row, `lower` of two: codes 0, 2, 4, 6 and 1, 3, 5, 7 of a step's word.
__device__ __forceinline__ void decode_folded(uint32_t (&a)[kFoldSteps][4], const uint4& piece, int lower,
                                              const FoldTable& table) {
  const uint32_t words[kFoldSteps] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int step = 0; step < kFoldSteps; ++step) {
    const uint32_t word = words[step], places = word & 0x77777777u;
    const uint32_t first = ptx::pick_bytes(table.low, table.high, places);
    const uint32_t last = ptx::pick_bytes(table.low, table.high, places >> 16);
    a[step][lower] = __byte_perm(first, last, 0x6420) | (word << 4 & 0x80808080u);
    a[step][lower + 2] = __byte_perm(first, last, 0x7531) | (word & 0x80808080u);
  }
}

template <int kColumns>
__device__ __forceinline__ void multiply_stage(float (&part)[kColumns / 2], uint32_t (&a)[kFoldSteps][4], uint64_t b) {
  ptx::pin_registers(a);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kFoldSteps; ++step) {
    ptx::wgmma_k32_e4m3<kColumns>(part, a[step], ptx::advance_descriptor(b, step * 32), step > 0);
  }
  ptx::wgmma_commit();
}

// 2^-distance, or 0 where that is no normal number.
__device__ __forceinline__ float power_below(uint32_t distance) {
  return distance > 126 ? 0.0f : __uint_as_float((127 - distance) << 23);
}

// The largest of four scales that lies below `limit`, or -1.
__device__ __forceinline__ int largest_below(uint32_t scales, int limit) {
  int largest = -1;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int scale = scales >> 8 * i & 0xFFu;
    if (scale < limit) largest = max(largest, scale);
  }
  return largest;
}

// What a thread knows of a stage before it is multiplied.
struct FoldStage {
  const uint4* pieces;      // this thread's, one a row, kConsumers apart
  const uint32_t* scales;   // of this thread's first row, four a word; those of the others are 256 words apart
  uint32_t own[kRowSets];   // of this thread's 32 columns
  bool beyond;              // some row of the warpgroup has a scale outside its window
};

// The stage `chunk`, which is there.
__device__ __forceinline__ FoldStage next_stage(const ProductMemory<MoeFormat::kMxfp4Folded>& memory,
                                                Rings<MoeFormat::kMxfp4Folded>& rings, int warpgroup, int chunk,
                                                int chunks, const uint32_t (&base)[kRowSets]) {
  using Shape = WeightShape<MoeFormat::kMxfp4Folded>;
  const int lane = threadIdx.x % kWarp, slot = threadIdx.x / kWarp * 8 + lane / 4;
  FoldStage stage;
  stage.pieces = memory.weights[rings.weights.stage][0] + threadIdx.x;
  const auto* const row = reinterpret_cast<const uint32_t*>(memory.scales[rings.scale_buffer] + slot);
  stage.scales = row + chunk % Shape::kScaleSpan;
  bool beyond = false;
#pragma unroll
  for (int set = 0; set < kRowSets; ++set) {
    stage.own[set] = stage.scales[set * 256] >> lane % 4 * 8 & 0xFFu;
    beyond = beyond || base[set] - stage.own[set] > kFoldSpan;
  }
  if (chunk % Shape::kScaleSpan == Shape::kScaleSpan - 1 || chunk == chunks - 1) {
    rings.scale_buffer = rings.scale_buffer + 1 == Shape::kScaleBuffers ? 0 : rings.scale_buffer + 1;
  }
  stage.beyond = ptx::named_barrier_or(kWarpgroupBarrier + warpgroup, kWarpgroup, beyond);
  return stage;
}

// The first operand of the rows of `matrix`, where no scale is beyond.
__device__ __forceinline__ void decode_stage(uint32_t (&a)[kFoldSteps][4], const FoldStage& stage, int matrix,
                                             const uint32_t (&base)[kRowSets]) {
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int set = 2 * matrix + lower;
    decode_folded(a, stage.pieces[set * kConsumers], lower, FoldTable(stage.own[set] + kFoldSpan - base[set]));
  }
  ptx::pin_registers(a);
}

// sums += part * scale of x; `scales` from this thread's first column on.
template <int kColumns>
__device__ __forceinline__ void add_part(float* sums, const float (&part)[kColumns / 2], const float* scales) {
#pragma unroll
  for (int i = 0; i < kColumns / 2; i += 4) {
    const float2 scale = *reinterpret_cast<const float2*>(scales + 2 * i);
    sums[i] = __fmaf_rn(part[i], scale.x, sums[i]);
    sums[i + 1] = __fmaf_rn(part[i + 1], scale.y, sums[i + 1]);
    sums[i + 2] = __fmaf_rn(part[i + 2], scale.x, sums[i + 2]);
    sums[i + 3] = __fmaf_rn(part[i + 3], scale.y, sums[i + 3]);
  }
}

// A stage with scales beyond: bases are raised, and what lies below their windows is multiplied by itself.
template <int kN, int kColumns>
__device__ __forceinline__ void multiply_windows(float (&acc)[2][kN / 2], float (&part)[kColumns / 2],
                                                 uint32_t (&base)[kRowSets], const FoldStage& stage, int warpgroup,
                                                 uint64_t panel, const float* row_scales) {
  int limit[kRowSets];  // scales of a row from here on are done
#pragma unroll
  for (int set = 0; set < kRowSets; ++set) {
    limit[set] = 256;
    const uint32_t largest = largest_below(stage.scales[set * 256], 256);
    if (largest <= base[set]) continue;
    const uint32_t raised = largest == 255 ? 255 : min(largest + kFoldMargin, 254u);
    const float factor = power_below(raised - base[set]);
    base[set] = raised;
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      if (i / 2 % 2 == set % 2) acc[set / 2][i] *= factor;
    }
  }
  bool more = true;
  while (more) {
    more = false;
#pragma unroll
    for (int matrix = 0; matrix < 2; ++matrix) {
      uint32_t a[kFoldSteps][4];
      float gain[2];
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int set = 2 * matrix + lower, top = largest_below(stage.scales[set * 256], limit[set]);
        const int bottom = top - static_cast<int>(kFoldSpan), own = stage.own[set];
        FoldTable table(own - bottom);
        if (own < bottom || own >= limit[set]) table.low = table.high = 0;
        decode_folded(a, stage.pieces[set * kConsumers], lower, table);
        gain[lower] = power_below(base[set] - top);
        limit[set] = bottom;
        more = more || largest_below(stage.scales[set * 256], bottom) >= 0;
      }
#pragma unroll
      for (int first = 0; first < kN; first += kColumns) {
        multiply_stage<kColumns>(part, a, ptx::advance_descriptor(panel, first * 128));
        ptx::wgmma_wait<0>();
        ptx::pin_registers(part);
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) part[i] *= gain[i / 2 % 2];
        add_part<kColumns>(acc[matrix] + first / 2, part, row_scales + first);
      }
    }
    more = ptx::named_barrier_or(kWarpgroupBarrier + warpgroup, kWarpgroup, more);
  }
}

// acc[matrix] [64 weight rows of this warpgroup, kN rows of the block].
template <int kN>
__device__ __forceinline__ void multiply_folded(const PrefillProduct& product,
                                                ProductMemory<MoeFormat::kMxfp4Folded>& memory,
                                                Rings<MoeFormat::kMxfp4Folded>& rings, int warpgroup,
                                                float (&acc)[2][kN / 2]) {
  constexpr int kParts = kN > 64 ? 2 : 1, kColumns = kN / kParts, kUnits = 2 * kParts;
  const int chunks = product.k / WeightShape<MoeFormat::kMxfp4Folded>::kChunk;
  uint32_t base[kRowSets] = {};
  float part[kColumns / 2] = {};
  uint32_t a[2][kFoldSteps][4];
  const auto await_weights = [&] {
    ptx::mbarrier_wait(ptx::shared_address(memory.full_weights + rings.weights.stage), rings.weights.parity);
  };
  const auto go_on = [&](int chunk) {  // the stage has been decoded
    ptx::mbarrier_arrive(ptx::shared_address(memory.empty_weights[rings.weights.stage] + warpgroup));
    rings.weights.advance();
    if (chunk + 1 < chunks) await_weights();
  };
  await_weights();
  FoldStage stage = next_stage(memory, rings, warpgroup, 0, chunks, base);
  decode_stage(a[0], stage, 0, base);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const float* const row_scales = memory.panel_scales[rings.panels.stage] + threadIdx.x % 4 * 2;
    ptx::mbarrier_wait(ptx::shared_address(memory.full_panels + rings.panels.stage), rings.panels.parity);
    const uint64_t panel =
        ptx::wgmma_descriptor(ptx::shared_address(memory.panels[rings.panels.stage]), 16, 1024, true);
    if (stage.beyond) [[unlikely]] {
      multiply_windows<kN, kColumns>(acc, part, base, stage, warpgroup, panel, row_scales);
      go_on(chunk);
      if (chunk + 1 < chunks) {
        stage = next_stage(memory, rings, warpgroup, chunk + 1, chunks, base);
        decode_stage(a[0], stage, 0, base);
      }
    } else {
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        const int matrix = unit / kParts, first = unit % kParts * kColumns;
        multiply_stage<kColumns>(part, a[matrix], ptx::advance_descriptor(panel, first * 128));
        if (unit == kParts - 1) {
          decode_stage(a[1], stage, 1, base);
          go_on(chunk);  // its loop keeps decoding before the wait for the product
        }
        if (unit == kUnits - 1 && chunk + 1 < chunks) {
          stage = next_stage(memory, rings, warpgroup, chunk + 1, chunks, base);
          decode_stage(a[0], stage, 0, base);
        }
        ptx::wgmma_wait<0>();
        ptx::pin_registers(part);
        add_part<kColumns>(acc[matrix] + first / 2, part, row_scales + first);
      }
    }
    ptx::mbarrier_arrive(ptx::shared_address(memory.empty_panels + rings.panels.stage));
    rings.panels.advance();
  }
#pragma unroll
  for (int set = 0; set < kRowSets; ++set) {
    const float unit = decode_ue8m0(base[set]);  // NaN where a scale is
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      if (i / 2 % 2 == set % 2) acc[set / 2][i] = acc[set / 2][i] * 0x1p-6f * unit;
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace dsv4

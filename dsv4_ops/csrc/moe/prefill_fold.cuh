// MXFP4 weights on the tensor cores' FP8: the inner loop of prefill_product.cuh where x stays in E4M3.
//
// An E2M1 code times 2^s is an E4M3 code for s from -5 to 6, so the scales of a row fold into its codes as long as they
// lie within 11 powers of two. A thread keeps the sums of a row in units of 2^(base - 133): base is raised, and the sums
// are scaled down, where a scale comes that is larger; it takes a margin of four, so that this happens about once a
// tile. Whether all scales of a stage (128 columns) fit is asked of the whole warpgroup. Where they do not, the stage is
// multiplied once for every window of scales that one of its rows has, each time with the codes of the others zero: the
// operands are exact for all scales, and nothing has to be known of the weights beforehand.
//
// FP8 wgmma keeps 13 bits of the largest product (and sum) of 32, so the sums of a stage are taken by themselves, of up
// to 64 rows of the block at a time, and are added to the accumulators in fp32, times the scale of x:
//
//   decode    two rows of a matrix: a table of eight codes for each (two products of s), a byte permutation for four
//             codes, nine instructions for eight
//   multiply  4 wgmma m64n<up to 64>k32, and the second matrix decoded meanwhile
//   add       a multiplication-addition a sum and stage, and a load of x's scales for each two columns
//
// What bounds it, in cycles of an SM for a stage and a block of n rows: tensor cores 8n, half of the 16-bit product; L2,
// 16 KB of weights and 128n bytes of rows. A scheduler issues for a stage about 2 x (2 x (100 + 1.5n)) instructions, of
// which decoding's are on a pipe of half the rate: about as long as the tensor cores at n = 128 and longer below.
#pragma once

namespace dsv4 {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr uint32_t kFoldSpan = 11;    // scales from base - 11 to base
constexpr uint32_t kFoldMargin = 4;   // of a new base above its scale
constexpr int kFoldSteps = 4;         // of 32 columns, in a stage

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
    const uint32_t first = __byte_perm(table.low, table.high, places);
    const uint32_t last = __byte_perm(table.low, table.high, places >> 16);
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
    ptx::wgmma_codes<kColumns>(part, a[step], ptx::advance_descriptor(b, step * 32), step > 0);
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

// acc[matrix] [64 weight rows of this warpgroup, kN rows of the block].
template <int kN>
__device__ __forceinline__ void multiply_folded(const PrefillProduct& product,
                                                ProductMemory<MoeFormat::kMxfp4Folded>& memory,
                                                Rings<MoeFormat::kMxfp4Folded>& rings, int warpgroup,
                                                float (&acc)[2][kN / 2]) {
  using Shape = WeightShape<MoeFormat::kMxfp4Folded>;
  constexpr int kParts = kN > 64 ? 2 : 1, kColumns = kN / kParts;
  const int lane = threadIdx.x % kWarp, t = lane % 4, slot = threadIdx.x / kWarp * 8 + lane / 4;
  const int chunks = product.k / Shape::kChunk;
  uint32_t base[kRowSets] = {};
  float part[kColumns / 2] = {};
  for (int chunk = 0; chunk < chunks; ++chunk) {
    ptx::mbarrier_wait(ptx::shared_address(memory.full_weights + rings.weights.stage), rings.weights.parity);
    const auto* const scale_words = reinterpret_cast<const uint32_t*>(memory.scales[rings.scale_buffer]);
    uint32_t scales[kRowSets], own[kRowSets];  // of the stage's groups of 32 columns; of this thread's
    bool fits = true;
#pragma unroll
    for (int set = 0; set < kRowSets; ++set) {
      scales[set] = scale_words[(set * 64 + slot) * 4 + chunk % Shape::kScaleSpan];
      own[set] = scales[set] >> 8 * t & 0xFFu;
      fits = fits && base[set] - own[set] <= kFoldSpan;
    }
    if (chunk % Shape::kScaleSpan == Shape::kScaleSpan - 1 || chunk == chunks - 1) {
      rings.scale_buffer = rings.scale_buffer + 1 == Shape::kScaleBuffers ? 0 : rings.scale_buffer + 1;
    }
    const bool any_beyond = ptx::named_barrier_or(kWarpgroupBarrier + warpgroup, kWarpgroup, !fits);
    const uint4* const pieces = memory.weights[rings.weights.stage][0] + threadIdx.x;
    const float* const row_scales = memory.panel_scales[rings.panels.stage] + 2 * t;
    ptx::mbarrier_wait(ptx::shared_address(memory.full_panels + rings.panels.stage), rings.panels.parity);
    const uint64_t panel =
        ptx::wgmma_descriptor(ptx::shared_address(memory.panels[rings.panels.stage]), 16, 1024, true);
    const uint32_t weights_read = ptx::shared_address(memory.empty_weights[rings.weights.stage] + warpgroup);
    if (!any_beyond) [[likely]] {
      uint32_t a[2][kFoldSteps][4];
      const auto decode = [&](int matrix) {
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
          const int set = 2 * matrix + lower;
          const FoldTable table(own[set] + kFoldSpan - base[set]);
          decode_folded(a[matrix], pieces[set * kConsumers], lower, table);
        }
      };
      decode(0);
#pragma unroll
      for (int unit = 0; unit < 2 * kParts; ++unit) {
        const int matrix = unit / kParts, first = unit % kParts * kColumns;
        multiply_stage<kColumns>(part, a[matrix], ptx::advance_descriptor(panel, first * 128));
        if (unit == kParts - 1) {
          decode(1);
          ptx::mbarrier_arrive(weights_read);
        }
        ptx::wgmma_wait<0>();
        ptx::pin_registers(part);
#pragma unroll
        for (int i = 0; i < kColumns / 2; i += 4) {
          const float2 scale = *reinterpret_cast<const float2*>(row_scales + first + 2 * i);
          float* const sums = acc[matrix] + first / 2 + i;
          sums[0] = __fmaf_rn(part[i], scale.x, sums[0]);
          sums[1] = __fmaf_rn(part[i + 1], scale.y, sums[1]);
          sums[2] = __fmaf_rn(part[i + 2], scale.x, sums[2]);
          sums[3] = __fmaf_rn(part[i + 3], scale.y, sums[3]);
        }
      }
    } else {
      int limit[kRowSets];  // scales of a row from here on are done
#pragma unroll
      for (int set = 0; set < kRowSets; ++set) {
        limit[set] = 256;
        const uint32_t largest = largest_below(scales[set], 256);
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
        bool left = false;
#pragma unroll
        for (int matrix = 0; matrix < 2; ++matrix) {
          uint32_t a[kFoldSteps][4];
          float gain[2];
#pragma unroll
          for (int lower = 0; lower < 2; ++lower) {
            const int set = 2 * matrix + lower, top = largest_below(scales[set], limit[set]);
            const int bottom = top - static_cast<int>(kFoldSpan), scale = own[set];
            FoldTable table(scale - bottom);
            if (scale < bottom || scale >= limit[set]) table.low = table.high = 0;
            decode_folded(a, pieces[set * kConsumers], lower, table);
            gain[lower] = power_below(base[set] - top);
            limit[set] = bottom;
            left = left || largest_below(scales[set], bottom) >= 0;
          }
#pragma unroll
          for (int first = 0; first < kN; first += kColumns) {
            multiply_stage<kColumns>(part, a, ptx::advance_descriptor(panel, first * 128));
            ptx::wgmma_wait<0>();
            ptx::pin_registers(part);
#pragma unroll
            for (int i = 0; i < kColumns / 2; i += 4) {
              const float2 scale = *reinterpret_cast<const float2*>(row_scales + first + 2 * i);
              float* const sums = acc[matrix] + first / 2 + i;
              sums[0] = __fmaf_rn(part[i] * gain[0], scale.x, sums[0]);
              sums[1] = __fmaf_rn(part[i + 1] * gain[0], scale.y, sums[1]);
              sums[2] = __fmaf_rn(part[i + 2] * gain[1], scale.x, sums[2]);
              sums[3] = __fmaf_rn(part[i + 3] * gain[1], scale.y, sums[3]);
            }
          }
        }
        more = ptx::named_barrier_or(kWarpgroupBarrier + warpgroup, kWarpgroup, left);
      }
      ptx::mbarrier_arrive(weights_read);
    }
    ptx::mbarrier_arrive(ptx::shared_address(memory.empty_panels + rings.panels.stage));
    rings.weights.advance();
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

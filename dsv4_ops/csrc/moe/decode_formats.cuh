// What a warp does with a stage of weights, for each format: products with 8 or 16 rows of x.
//
// A stage is 32 rows of a weight by 64 bytes: 128 values of E2M1, 64 of E4M3, 32 of bf16. In shared memory it is 16
// rows of eight 16-byte chunks and one more of padding, so that eight rows of a chunk lie in different banks and every
// chunk is a constant away: rows 0..15 of the weight in the chunks 0..3, rows 16..31 in the chunks 4..7. The stage is
// thus two fragments high (m = 0, 1); behind it lie the scales of each row. Weights are the M of the products and rows
// of x their N, eight of them a tile of x. All operands are exact in f16 (or bf16), all sums are fp32:
//
//   MXFP4   codes; the sum of 32 products is scaled by the weight's scale, the sum of 128 by that of x
//   NVFP4   codes times block scales; global scales in the end
//   FP8     codes; the sum of 64 products is scaled by both scales
//   dense   bf16
//
// A row of x lies in shared memory in parts of 64 bytes that hold what the four lanes of a row of a fragment want, 16
// bytes for each (see `place`), and is padded by 64 bytes: then 8 rows of one part are read without conflict.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/number_formats.cuh"
#include "common/ptx.cuh"
#include "common/weight_fragments.cuh"
#include "moe/moe.h"

namespace dsv4::moe {

constexpr int kStageRows = 32, kStageRowBytes = 64;
constexpr int kStageChunks = kStageRowBytes / 16;
constexpr int kPartBytes = 64;  // of a row of x

constexpr int kStagePitch = kTileRowBytes + 16, kStageScales = kTileRows * kStagePitch;  // where the scales start

template <typename Format>
constexpr int kStageBytes = kStageScales + kStageRows * Format::kScaleBytes;

// Chunks `chunk` (even) and chunk + 1 of all rows: what load_chunks of weight_fragments.cuh gives.
__device__ __forceinline__ void load_stage(uint32_t (&words)[4], const uint8_t* stage, int chunk, int lane) {
  ptx::ldmatrix_x4(words, stage + lane % kTileRows * kStagePitch + lane / kTileRows * 16 + chunk * 16);
}

// What a lane multiplies with: its part of the rows lane / 4 of each tile of x, and the scales of a 128 of k.
template <int kTiles>
struct LaneRows {
  const uint8_t* rows[kTiles];  // at 16 * (lane % 4)
  const float* scales;          // MXFP4, FP8: of rows 2 * (lane % 4) and the next, at the first 128 of k
  int scale_stride;             // to the next 128
  const float* upper_scales;    // FP8: of the weight's rows 0..7 (and 16..23), at the first 128 of k
  const float* lower_scales;    // and of the others

  __device__ __forceinline__ float2 scale(int block, int tile) const {
    const float* const two = scales + block * scale_stride + 8 * tile;  // at any place
    return {two[0], two[1]};
  }
};

// Sums of rows lane / 4 (first two) and lane / 4 + 8 of fragment m with rows 2 * (lane % 4) and the next of x.
template <int kTiles>
using Sums = float[kTiles][2][4];

template <int kTiles>
__device__ __forceinline__ void scale_and_add(Sums<kTiles>& sums, int m, int tile, const float (&addend)[4],
                                              float2 upper, float2 lower) {
  float(&sum)[4] = sums[tile][m];
  sum[0] = __fmaf_rn(addend[0], upper.x, sum[0]);
  sum[1] = __fmaf_rn(addend[1], upper.y, sum[1]);
  sum[2] = __fmaf_rn(addend[2], lower.x, sum[2]);
  sum[3] = __fmaf_rn(addend[3], lower.y, sum[3]);
}

// kHalves: x lies in shared memory in f16, twice as large as its codes, and need not be converted again for each stage.
template <bool kHalves>
struct Mxfp4 {
  static constexpr MoeFormat kFormat = MoeFormat::kMxfp4;
  static constexpr int kStep = 128;       // values of a row of a stage
  static constexpr int kScaleBytes = 4;   // of a row of a stage
  static constexpr int kEightBytes = kHalves ? 16 : 8;  // of eight values of x in shared memory
  static constexpr bool kBlockScales = true;  // x has a scale for each 128 of k
  static constexpr float kUnit = kE2m1HalvesUnit;

  // Values 8j .. 8j + 7 of a row of x, in E4M3.
  static __device__ __forceinline__ void store(uint8_t* row, int j, uint2 codes) {
    const uint2 ordered = fp4_order(codes);
    if constexpr (kHalves) {
      uint32_t first[2], second[2];
      e4m3_halves(first, ordered.x);
      e4m3_halves(second, ordered.y);
      *reinterpret_cast<uint4*>(row + j / 4 * kPartBytes + j % 4 * 16) = {first[0], first[1], second[0], second[1]};
    } else {
      *reinterpret_cast<uint2*>(row + j / 8 * kPartBytes + j % 4 * 16 + j / 4 % 2 * 8) = ordered;
    }
  }

  template <int kTiles>
  static __device__ __forceinline__ void step(Sums<kTiles>& sums, const uint8_t* stage, const LaneRows<kTiles>& x,
                                              int step, int lane) {
    uint32_t scales[2][2];
    const auto* const words = reinterpret_cast<const uint32_t*>(stage + kStageScales) + lane / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) scales[i / 2][i % 2] = words[8 * i];
    Sums<kTiles> of_128 = {};
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      uint32_t b[kTiles][2][4];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) load_x(b[tile], x.rows[tile], 2 * step + part);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        uint32_t codes[4];
        load_stage(codes, stage, kStageChunks * m + 2 * part, lane);
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) {
          uint32_t upper[4], lower[4], a[2][4];
          e2m1_halves(upper, codes[2 * chunk]);
          e2m1_halves(lower, codes[2 * chunk + 1]);
          fp4_fragments(a, upper, lower);
          const float up = scale_of(scales[m][0], 2 * part + chunk);
          const float low = scale_of(scales[m][1], 2 * part + chunk);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            float of_32[4];
            ptx::mul_m16n8k16_f16(of_32, a[0], {b[tile][chunk][0], b[tile][chunk][1]});
            ptx::mma_m16n8k16_f16(of_32, a[1], {b[tile][chunk][2], b[tile][chunk][3]});
            scale_and_add<kTiles>(of_128, m, tile, of_32, {up, up}, {low, low});
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float2 scale = x.scale(step, tile);
#pragma unroll
      for (int m = 0; m < 2; ++m) scale_and_add<kTiles>(sums, m, tile, of_128[tile][m], scale, scale);
    }
  }

 private:
  // The lane's pairs of 64 values, two chunks.
  static __device__ __forceinline__ void load_x(uint32_t (&b)[2][4], const uint8_t* row, int of_64) {
    const int parts = kHalves ? 2 : 1;
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      const uint4 loaded = *reinterpret_cast<const uint4*>(row + (parts * of_64 + part) * kPartBytes);
      const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kHalves) {
          b[part][i] = words[i];
        } else {
          uint32_t halves[2];
          e4m3_halves(halves, words[i]);
          b[i / 2][i % 2 * 2] = halves[0], b[i / 2][i % 2 * 2 + 1] = halves[1];
        }
      }
    }
  }

  // UE8M0 byte i of a word, but 0 for the byte 0 (2^-127) and infinity for 255 (NaN), of which the end of the sum makes
  // NaN again.
  static __device__ __forceinline__ float scale_of(uint32_t word, int i) {
    return __uint_as_float((i == 3 ? word >> 1 : word << (23 - 8 * i)) & 0x7F800000u);
  }
};

struct Nvfp4 {
  static constexpr MoeFormat kFormat = MoeFormat::kNvfp4;
  static constexpr int kStep = 128;
  static constexpr int kScaleBytes = 8;
  static constexpr int kEightBytes = 16;
  static constexpr bool kBlockScales = false;
  static constexpr float kUnit = kNvfp4HalvesUnit;

  // Packed codes of values 8j .. 8j + 7 of a row of x and their E4M3 block scale.
  static __device__ __forceinline__ void store(uint8_t* row, int j, uint32_t codes, uint32_t scale) {
    uint32_t halves[4];
    nvfp4_halves(halves, codes, nvfp4_factor(scale));
#pragma unroll
    for (uint32_t& pair : halves) {  // exact: 2^-10 .. 2688
      const __half2 value = __hmul2_rn(reinterpret_cast<const __half2&>(pair), __float2half2_rn(kUnit));
      pair = reinterpret_cast<const uint32_t&>(value);
    }
    *reinterpret_cast<uint4*>(row + j / 4 * kPartBytes + j % 4 * 16) = {halves[0], halves[1], halves[2], halves[3]};
  }

  template <int kTiles>
  static __device__ __forceinline__ void step(Sums<kTiles>& sums, const uint8_t* stage, const LaneRows<kTiles>& x,
                                              int step, int lane) {
    __half2 factors[2][2][4];  // of fragment m, its rows lane / 4 and lane / 4 + 8, and each chunk
    const auto* const scales = reinterpret_cast<const uint2*>(stage + kStageScales) + lane / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) find_factors(factors[i / 2][i % 2], scales[8 * i], lane);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      uint4 b[kTiles][2];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) {
          b[tile][chunk] = *reinterpret_cast<const uint4*>(x.rows[tile] + (4 * step + 2 * part + chunk) * kPartBytes);
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        uint32_t codes[4];
        load_stage(codes, stage, kStageChunks * m + 2 * part, lane);
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) {
          uint32_t upper[4], lower[4], a[2][4];
          nvfp4_halves(upper, codes[2 * chunk], factors[m][0][2 * part + chunk]);
          nvfp4_halves(lower, codes[2 * chunk + 1], factors[m][1][2 * part + chunk]);
          fp4_fragments(a, upper, lower);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            const uint4& pairs = b[tile][chunk];
            ptx::mma_m16n8k16_f16(sums[tile][m], a[0], {pairs.x, pairs.y});
            ptx::mma_m16n8k16_f16(sums[tile][m], a[1], {pairs.z, pairs.w});
          }
        }
      }
    }
  }

 private:
  // A lane's eight values of chunk i lie in block 2i + (lane % 4) / 2 of the eight.
  static __device__ __forceinline__ void find_factors(__half2 (&factors)[4], uint2 scales, int lane) {
    const uint32_t mine = __byte_perm(scales.x, scales.y, lane % 4 < 2 ? 0x6420 : 0x7531);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const __half2 two = ptx::cvt_half2(static_cast<uint16_t>(mine >> 16 * i));
      const __half2 scaled = __hmul2_rn(two, __float2half2_rn(kUnit));
      factors[2 * i] = __low2half2(scaled);
      factors[2 * i + 1] = __high2half2(scaled);
    }
  }
};

// Eight values of which four words hold a fragment's pair each (E4M3: two codes of two) or two (bf16), for a part whose
// lane i takes the words i, i + 4, i + 8 and i + 12.
__device__ __forceinline__ void store_word(uint8_t* row, int word, uint32_t value) {
  *reinterpret_cast<uint32_t*>(row + word / 16 * kPartBytes + word % 4 * 16 + word / 4 % 4 * 4) = value;
}

struct Fp8 {
  static constexpr MoeFormat kFormat = MoeFormat::kFp8;
  static constexpr int kStep = 64;
  static constexpr int kScaleBytes = 0;
  static constexpr int kEightBytes = 8;
  static constexpr bool kBlockScales = true;
  static constexpr float kUnit = 1.0f;

  static __device__ __forceinline__ void store(uint8_t* row, int j, uint2 codes) {
    store_word(row, 2 * j, codes.x);
    store_word(row, 2 * j + 1, codes.y);
  }

  template <int kTiles>
  static __device__ __forceinline__ void step(Sums<kTiles>& sums, const uint8_t* stage, const LaneRows<kTiles>& x,
                                              int step, int lane) {
    uint32_t b[kTiles][4][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint4 codes = *reinterpret_cast<const uint4*>(x.rows[tile] + step * kPartBytes);
      e4m3_halves(b[tile][0], codes.x);
      e4m3_halves(b[tile][1], codes.y);
      e4m3_halves(b[tile][2], codes.z);
      e4m3_halves(b[tile][3], codes.w);
    }
    Sums<kTiles> of_64 = {};
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int first = 0; first < kStageChunks; first += 2) {
        uint32_t codes[4];
        load_stage(codes, stage, kStageChunks * m + first, lane);
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) {
          uint32_t a[4];
          e4m3_fragment(a, codes[2 * chunk], codes[2 * chunk + 1]);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            ptx::mma_m16n8k16_f16(of_64[tile][m], a, b[tile][first + chunk]);
          }
        }
      }
    }
    const int block = step * kStep / kMoeWidth;
    const float upper = x.upper_scales[block], lower = x.lower_scales[block];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float2 scale = x.scale(block, tile);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        scale_and_add<kTiles>(sums, m, tile, of_64[tile][m], {scale.x * upper, scale.y * upper},
                              {scale.x * lower, scale.y * lower});
      }
    }
  }
};

struct Dense {
  static constexpr MoeFormat kFormat = MoeFormat::kDense;
  static constexpr int kStep = 32;
  static constexpr int kScaleBytes = 0;
  static constexpr int kEightBytes = 16;
  static constexpr bool kBlockScales = false;
  static constexpr float kUnit = 1.0f;

  static __device__ __forceinline__ void store(uint8_t* row, int j, uint4 values) {
    store_word(row, 4 * j, values.x);
    store_word(row, 4 * j + 1, values.y);
    store_word(row, 4 * j + 2, values.z);
    store_word(row, 4 * j + 3, values.w);
  }

  template <int kTiles>
  static __device__ __forceinline__ void step(Sums<kTiles>& sums, const uint8_t* stage, const LaneRows<kTiles>& x,
                                              int step, int lane) {
    uint4 b[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      b[tile] = *reinterpret_cast<const uint4*>(x.rows[tile] + step * kPartBytes);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      uint32_t first[4], second[4];
      load_stage(first, stage, kStageChunks * m, lane);
      load_stage(second, stage, kStageChunks * m + 2, lane);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        ptx::mma_m16n8k16_bf16(sums[tile][m], first, {b[tile].x, b[tile].y});
        ptx::mma_m16n8k16_bf16(sums[tile][m], second, {b[tile].z, b[tile].w});
      }
    }
  }
};

}  // namespace dsv4::moe

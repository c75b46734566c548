// x of a streaming product in shared memory: what a launch decides about it, and how it gets there.
#pragma once

#include "common/divisor.cuh"
#include "common/number_formats.cuh"
#include "common/ptx.cuh"
#include "common/weight_fragments.cuh"
#include "gemm/plan.h"

namespace dsv4 {

constexpr int kThreads = 32 * kWarps;

// What a launch of a streaming product decides; the same for all CTAs.
struct Stream {
  Product product;
  int64_t first_token;
  int tokens;          // of this launch
  int range_shift;     // log2 of the ranges of k
  int pieces;          // of a weight row
  int whole_pieces;
  int row_bytes;       // of the weight
  int64_t row_pitch;   // bytes from one to the next
  int tiles;           // of a CTA's rows, in a group
  int tiles_of_cta;
  int window;          // pieces of a range whose x is in shared memory
  int x_pitch;         // bytes of a token in a window
  int x_groups;        // scale groups of x in a window
  int x_group_shift;   // log2 of their size; 0 without such groups
  Divisor units = Divisor(1);       // 16 bytes of x, in a window of a token
  Divisor tokens_divisor = Divisor(1);

  __device__ __forceinline__ int first_piece(int range) const { return (range * pieces) >> range_shift; }
};

// Windows of x of some ranges of k: for each range and token a row of codes (E4M3) or values (f16, bf16) in the order
// of the weights' fragments, and for each range and scale group of E4M3 codes the scales of all tokens in fp32.
template <Format kFormat, int kTokens>
class StagedX {
  static constexpr FormatShape kShape = shape_of(kFormat);
  static constexpr bool kHasScales = kFormat == Format::kFp8 || kFormat == Format::kMxfp4;
  static constexpr bool kPacked = kFormat == Format::kNvfp4;
  static constexpr int kUnitValues = kPacked ? 32 : kFormat == Format::kDense ? 8 : 16;
  static constexpr int kBatch = kPacked ? 4 : 8;  // loads of a thread that are under way together
  static constexpr int kScaleBatch = 4;

 public:
  static constexpr int kUnits = kShape.piece_values / kUnitValues;  // of a piece

  __device__ __forceinline__ StagedX(const Stream& stream, uint8_t* values, float* scales, int first_range, int ranges)
      : s(stream), p(stream.product), values(values), scales(scales), first_range(first_range), ranges(ranges) {}

  // The window that begins `offset` pieces behind the start of every range.
  __device__ __forceinline__ void load(int offset) const {
    uint32_t scale_codes[kScaleBatch];
    if constexpr (kHasScales) load_scales(scale_codes, 0, offset);
    const int count = ranges * s.tokens * static_cast<int>(s.units.value());
    for (int first = threadIdx.x; first < count; first += kBatch * kThreads) {
      uint4 codes[kBatch];
      uint32_t block_scales[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) load_unit(codes[i], block_scales[i], first + i * kThreads, count, offset);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i * kThreads < count) store_unit(first + i * kThreads, codes[i], block_scales[i]);
      }
    }
    if constexpr (kHasScales) {
      for (int first = 0; first < ranges * s.x_groups * kTokens; first += kScaleBatch * kThreads) {
        if (first > 0) load_scales(scale_codes, first, offset);
        store_scales(scale_codes, first);
      }
    }
  }

 private:
  __device__ __forceinline__ int64_t x_row(int token) const {
    return (s.first_token + token) * p.groups + blockIdx.z;
  }

  // Unit i is 16 bytes of row i / units, which is that of a range and a token.
  __device__ __forceinline__ void load_unit(uint4& codes, uint32_t& block_scales, int i, int count, int offset) const {
    const int row = s.units.divide(i), unit = i - row * static_cast<int>(s.units.value());
    const int here = s.tokens_divisor.divide(row), token = row - here * s.tokens;
    const int piece = s.first_piece(first_range + here) + offset;
    const int units = (s.first_piece(first_range + here + 1) - piece) * kUnits;
    const int64_t k = static_cast<int64_t>(piece) * kShape.piece_values + unit * kUnitValues;
    codes = {};
    block_scales = 0;
    if (i >= count || unit >= units || k >= p.k) return;
    constexpr int kBytes = kFormat == Format::kDense ? 2 : 1;
    const int64_t at = x_row(token) * p.x_stride + (kPacked ? k / 2 : k);
    codes = ptx::load_once(static_cast<const uint8_t*>(p.x) + at * kBytes);
    if constexpr (kPacked) {
      const uint8_t* const of_unit = p.x_scale + x_row(token) * p.x_scale_stride + k / 16;
      block_scales = of_unit[0] | of_unit[1] << 8;
    }
  }

  __device__ __forceinline__ void store_unit(int i, const uint4& codes, uint32_t block_scales) const {
    const int row = s.units.divide(i), unit = i - row * static_cast<int>(s.units.value());
    uint8_t* const target = values + row * s.x_pitch;
    if constexpr (kFormat == Format::kMxfp4) {
      // 16 codes are half of the 32 of two chunks: two lanes' words in each.
      const uint2 one = fp4_order({codes.x, codes.y}), two = fp4_order({codes.z, codes.w});
      uint8_t* const half = target + unit / 2 * 32 + unit % 2 * 8;
      *reinterpret_cast<uint2*>(half) = {one.x, two.x};
      *reinterpret_cast<uint2*>(half + 16) = {one.y, two.y};
    } else if constexpr (kFormat == Format::kNvfp4) {
      const __half2 both = ptx::cvt_half2(static_cast<uint16_t>(block_scales));
      const __half2 low = __low2half2(both), high = __high2half2(both);
      uint32_t pairs[4][4];
      nvfp4_halves(pairs[0], codes.x, low);
      nvfp4_halves(pairs[1], codes.y, low);
      nvfp4_halves(pairs[2], codes.z, high);
      nvfp4_halves(pairs[3], codes.w, high);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        *reinterpret_cast<uint4*>(target + unit * 64 + j * 16) = {pairs[0][j], pairs[1][j], pairs[2][j], pairs[3][j]};
      }
    } else {
      *reinterpret_cast<uint4*>(target + unit * 16) = codes;
    }
  }

  // Scale i is that of token i % kTokens in group i / kTokens; tokens and groups that are not there have 0.
  __device__ __forceinline__ void load_scales(uint32_t (&codes)[kScaleBatch], int first, int offset) const {
    const int groups_of_piece = kShape.piece_values >> s.x_group_shift;
    const int groups = static_cast<int>(p.k) >> s.x_group_shift;
#pragma unroll
    for (int j = 0; j < kScaleBatch; ++j) {
      const int i = first + j * kThreads + threadIdx.x, token = i % kTokens, row = i / kTokens;
      const int here = row / s.x_groups, group = row - here * s.x_groups;
      const int from = (s.first_piece(first_range + here) + offset) * groups_of_piece + group;
      const bool there = here < ranges && token < s.tokens && from < groups;
      codes[j] = there ? p.x_scale[x_row(token) * p.x_scale_stride + from] : kNoScale;
    }
  }

  __device__ __forceinline__ void store_scales(const uint32_t (&codes)[kScaleBatch], int first) const {
#pragma unroll
    for (int j = 0; j < kScaleBatch; ++j) {
      const int i = first + j * kThreads + threadIdx.x;
      if (i < ranges * s.x_groups * kTokens) scales[i] = codes[j] == kNoScale ? 0.0f : decode_ue8m0(codes[j]);
    }
  }

  static constexpr uint32_t kNoScale = 256;

  const Stream& s;
  const Product& p;
  uint8_t* values;
  float* scales;
  int first_range, ranges;
};

}  // namespace dsv4

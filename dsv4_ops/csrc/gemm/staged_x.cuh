// x of a streaming product in shared memory, and how it gets there.
#pragma once

#include "common/e4m3_bf16.cuh"
#include "common/number_formats.cuh"
#include "common/ptx.cuh"
#include "common/weight_fragments.cuh"
#include "gemm/stream_plan.cuh"

namespace dsv4 {

// Windows of x of a range of k: for each token a row of codes (E4M3) or values (f16, bf16) in the order of the weights'
// fragments, and for each scale group of E4M3 codes the scales of all tokens in fp32. `count` threads fill it together.
template <Format kFormat>
class StagedX {
  static constexpr FormatShape kShape = shape_of(kFormat);
  static constexpr bool kHasScales = kFormat == Format::kFp8 || kFormat == Format::kMxfp4;
  static constexpr bool kPacked = kFormat == Format::kNvfp4;
  static constexpr int kBytes = x_bytes(kFormat);
  static constexpr int kUnitValues = (kPacked ? 32 : 16) / kBytes;
  static constexpr int kBatch = 4;  // loads of a thread that are under way together

 public:
  static constexpr int kUnits = kShape.piece_values / kUnitValues;  // of a piece

  __device__ __forceinline__ StagedX(const Stream& stream, uint8_t* values, float* scales, int thread, int count)
      : s(stream), p(stream.product), values(values), scales(scales), thread(thread), count(count) {}

  // The window of pieces `piece` .. of a range that ends before `end`.
  __device__ __forceinline__ void load(int piece, int end) const {
    const int64_t x_row = s.first_token * p.groups + blockIdx.z;
    const int k = piece * kShape.piece_values;
    const int units = static_cast<int>(s.units.value()), all = s.tokens * units;
    const int there = min((end - piece) * kUnits, (static_cast<int>(p.k) - k + kUnitValues - 1) / kUnitValues);
    const uint8_t* const source =
        static_cast<const uint8_t*>(p.x) + (x_row * p.x_stride + (kPacked ? k / 2 : k)) * kBytes;
    const uint8_t* const scale_source = p.x_scale + x_row * p.x_scale_stride + (kPacked ? k / 16 : 0);

    uint32_t scale_codes[kBatch];
    if constexpr (kHasScales) load_scales(scale_codes, 0, k, scale_source);
    for (int first = thread; first < all; first += kBatch * count) {
      uint4 codes[kBatch];
      uint32_t block_scales[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = first + i * count, token = s.units.divide(at), unit = at - token * units;
        codes[i] = {};
        block_scales[i] = 0;
        if (at < all && unit < there) {
          codes[i] = ptx::load_once(source + static_cast<int64_t>(token) * s.x_step + unit * 16);
          if constexpr (kPacked) {
            const uint8_t* const of_unit = scale_source + static_cast<int64_t>(token) * s.x_scale_step + 2 * unit;
            block_scales[i] = of_unit[0] | of_unit[1] << 8;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = first + i * count, token = s.units.divide(at);
        if (at < all) store_unit(values + token * s.x_pitch, at - token * units, codes[i], block_scales[i]);
      }
    }
    if constexpr (kHasScales) {
      for (int first = 0; first < s.x_groups * s.scale_tokens; first += kBatch * count) {
        if (first > 0) load_scales(scale_codes, first, k, scale_source);
        store_scales(scale_codes, first);
      }
    }
  }

 private:
  static constexpr uint32_t kNoScale = 256;

  // 16 bytes of x to where the fragments want them in a token's row.
  __device__ __forceinline__ static void store_unit(uint8_t* row, int unit, const uint4& codes, uint32_t block_scales) {
    if constexpr (kFormat == Format::kMxfp4) {
      // 16 codes are half of the 32 of two chunks: two lanes' words in each.
      const uint2 one = fp4_order({codes.x, codes.y}), two = fp4_order({codes.z, codes.w});
      uint8_t* const half = row + unit / 2 * 32 + unit % 2 * 8;
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
        *reinterpret_cast<uint4*>(row + unit * 64 + j * 16) = {pairs[0][j], pairs[1][j], pairs[2][j], pairs[3][j]};
      }
    } else if constexpr (kFormat == Format::kW8a16) {
      uint2 even, odd;
      split_even_odd(even, odd, codes);
      uint8_t* const half = row + unit / 2 * 32 + unit % 2 * 8;
      *reinterpret_cast<uint2*>(half) = even;
      *reinterpret_cast<uint2*>(half + 16) = odd;
    } else {
      *reinterpret_cast<uint4*>(row + unit * 16) = codes;
    }
  }

  // Scale i is that of token i % scale_tokens in group i / scale_tokens; what is not there has 0.
  __device__ __forceinline__ void load_scales(uint32_t (&codes)[kBatch], int first, int k,
                                              const uint8_t* source) const {
    const int group0 = k >> s.x_group_shift;
    const int groups = min(s.x_groups, (static_cast<int>(p.k) >> s.x_group_shift) - group0);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + j * count + thread, group = s.scale_tokens_divisor.divide(i);
      const int token = i - group * s.scale_tokens;
      codes[j] = kNoScale;
      if (group < groups && token < s.tokens) {
        codes[j] = source[static_cast<int64_t>(token) * s.x_scale_step + group0 + group];
      }
    }
  }

  __device__ __forceinline__ void store_scales(const uint32_t (&codes)[kBatch], int first) const {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + j * count + thread;
      if (i < s.x_groups * s.scale_tokens) scales[i] = codes[j] == kNoScale ? 0.0f : decode_ue8m0(codes[j]);
    }
  }

  const Stream& s;
  const Product& p;
  uint8_t* values;
  float* scales;
  int thread, count;
};

}  // namespace dsv4

// x of a wide product (wide_stream.cuh) in shared memory, as wgmma reads its second operand.
#pragma once

#include "common/e4m3_bf16.cuh"
#include "common/number_formats.cuh"
#include "common/weight_fragments.cuh"
#include "gemm/stream_plan.cuh"

namespace dsv4 {

// Windows of x of a range of k: [64 values of k][token], rows of 128 bytes, swizzled, so that a piece of the weight
// meets two blocks. E4M3 codes are turned into f16, and the scales of their groups lie behind as fp32 [group][token].
// Values of k stand in the order of the words of the weights' fragments:
//
//   E4M3 as f16   of 16: 0, 1, 4, 5, 8, 9, 12, 13 | 2, 3, 6, 7, 10, 11, 14, 15   (weight_fragments.cuh)
//   bf16          of 16: the even ones, then the odd ones                        (e4m3_bf16.cuh)
//
// All threads of the CTA fill a window together.
template <Format kFormat, int kTokens>
class WideX {
  static constexpr bool kCodes = kFormat == Format::kFp8;
  static constexpr int kBytes = x_bytes(kFormat);
  static constexpr int kUnitValues = 16 / kBytes;
  static constexpr int kUnits = kTileRowBytes / kUnitValues;  // of a token, of a piece
  static constexpr int kBatch = kTokens / 4 > 4 * kBytes ? kTokens / 4 : 4 * kBytes;  // a thread's loads under way
  static constexpr int kScaleBatch = 2;

 public:
  static constexpr int kBlockBytes = kTokens * 128;
  static constexpr int kPieceBytes = 2 * kBlockBytes;

  __device__ __forceinline__ WideX(const Stream& stream, uint8_t* values, float* scales)
      : s(stream), p(stream.product), values(values), scales(scales) {}

  // The window that begins with piece `piece` of a range that ends before `end`. Tokens that are not there repeat the
  // last one; nobody stores their sums. Behind k there are zeros.
  __device__ __forceinline__ void load(int piece, int end) const {
    const int64_t x_row = s.first_token * p.groups + blockIdx.z;
    const int k = piece * kTileRowBytes, pieces = min(s.window, end - piece);
    const int there = min(pieces * kTileRowBytes, static_cast<int>(p.k) - k);
    const uint8_t* const scale_source = p.x_scale + x_row * p.x_scale_stride + (k >> s.x_group_shift);
    uint32_t scale_codes[kScaleBatch];
    if constexpr (kCodes) load_scales(scale_codes, 0, there, scale_source);

    // A token's values of a piece are units of kUnits threads, so the CTA takes kTokensOfPass tokens at a time.
    constexpr int kTokensOfPass = kThreads / kUnits;
    const int unit = threadIdx.x % kUnits, all = pieces * kTokens;
    const auto* const source =
        static_cast<const uint8_t*>(p.x) + (x_row * p.x_stride + k + unit * kUnitValues) * kBytes;
    for (int first = threadIdx.x / kUnits; first < all; first += kBatch * kTokensOfPass) {
      uint4 units[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = first + i * kTokensOfPass, offset = at / kTokens * kTileRowBytes;
        const int token = min(at % kTokens, s.tokens - 1);
        units[i] = {};
        if (offset + unit * kUnitValues < there) {
          units[i] = ptx::load_once(source + static_cast<int64_t>(token) * s.x_step + offset * kBytes);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = first + i * kTokensOfPass;
        if (at < all) store_unit(at / kTokens, at % kTokens, unit, units[i]);
      }
    }
    if constexpr (kCodes) {
      for (int first = 0; first < s.x_groups * kTokens; first += kScaleBatch * kThreads) {
        if (first > 0) load_scales(scale_codes, first, there, scale_source);
        store_scales(scale_codes, first);
      }
    }
  }

 private:
  // 16 bytes of x: two chunks of 16 codes' f16 values, or half of two chunks of bf16 ones.
  __device__ __forceinline__ void store_unit(int piece, int token, int unit, const uint4& x) const {
    uint8_t* const block = values + piece * kPieceBytes + unit / (kUnits / 2) * kBlockBytes;
    if constexpr (kCodes) {
      uint32_t a[2], b[2], c[2], d[2];
      e4m3_halves(a, x.x);
      e4m3_halves(b, x.y);
      e4m3_halves(c, x.z);
      e4m3_halves(d, x.w);
      const int chunk = unit % 4 * 2;
      *reinterpret_cast<uint4*>(block + tile_offset(token, chunk)) = {a[0], b[0], c[0], d[0]};
      *reinterpret_cast<uint4*>(block + tile_offset(token, chunk + 1)) = {a[1], b[1], c[1], d[1]};
    } else {
      uint2 even, odd;
      split_even_odd(even, odd, x);
      const int chunk = unit % 8 / 2 * 2, half = unit % 2 * 8;
      *reinterpret_cast<uint2*>(block + tile_offset(token, chunk) + half) = even;
      *reinterpret_cast<uint2*>(block + tile_offset(token, chunk + 1) + half) = odd;
    }
  }

  static constexpr uint32_t kNoScale = 256;

  // Scale i is that of token i % kTokens in group i / kTokens; groups beyond the `there` values of k have 0.
  __device__ __forceinline__ void load_scales(uint32_t (&codes)[kScaleBatch], int first, int there,
                                              const uint8_t* source) const {
    const int groups = there >> s.x_group_shift;
#pragma unroll
    for (int j = 0; j < kScaleBatch; ++j) {
      const int i = first + j * kThreads + threadIdx.x, group = i / kTokens;
      const int token = min(i % kTokens, s.tokens - 1);
      codes[j] = group < groups ? source[static_cast<int64_t>(token) * s.x_scale_step + group] : kNoScale;
    }
  }

  __device__ __forceinline__ void store_scales(const uint32_t (&codes)[kScaleBatch], int first) const {
#pragma unroll
    for (int j = 0; j < kScaleBatch; ++j) {
      const int i = first + j * kThreads + threadIdx.x;
      if (i < s.x_groups * kTokens) scales[i] = codes[j] == kNoScale ? 0.0f : decode_ue8m0(codes[j]);
    }
  }

  const Stream& s;
  const Product& p;
  uint8_t* values;
  float* scales;
};

}  // namespace dsv4

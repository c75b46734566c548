// What the kernels of hc_mix share: products of the streams with fn on tensor cores, without loss.
//
// fn is cut into three bf16 parts whose sum it is (8 + 8 + 8 bits of mantissa); bf16 streams are one part as they are,
// fp32 streams are three. Products of parts are exact (those below 2^-28 are left out) and are added in fp32, smallest
// first.
//
// The order of a sum. A unit is 32 columns of one stream: a chain of mma for a token and an output. The units of a
// split (for n = 4: 8, 2 of each stream) are added to 0 in order, so are the splits of a group, and hc_collapse adds
// the groups. Squares are added the same way, in kSquareSums sums by column. Which warp adds what does not matter.
//
// A lane's share of a unit is what ldmatrix gives it: columns 2 q and 2 q + 1 of each 8, q = lane % 4.
#pragma once

#include "common/rms_norm.cuh"
#include "hyper_connection/streams.cuh"

namespace dsv4 {

constexpr int kTokens = 16;                // of a tile: rows of an mma
constexpr int kParts = 3;                  // of an fp32 number
constexpr int kTiles = 3;                  // mma tiles of 8 outputs
constexpr int kSteps = 2;                  // mma steps of 16 columns
constexpr int kOutputs = 8 * kTiles;       // of a CTA
constexpr int kUnitColumns = 16 * kSteps;  // of one stream
constexpr int kHalves = kSplitColumns / kUnitColumns;

struct MixArguments {
  const void* x;
  int64_t tokens;
  int streams;
  int width;
  int64_t stride;
  Post post;
  const float* fn;
  int outputs;
  float* partial;
  int chunks;
  int splits;  // that a CTA adds up
  int tiles;   // of tokens that a CTA goes through
};

// The two bf16 that are the top halves of two fp32 numbers (rounded towards zero), `low` in bits 0..15.
__device__ __forceinline__ uint32_t top_halves(float low, float high) {
  return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}

__device__ __forceinline__ float below_top_half(float value) {
  return value - __uint_as_float(__float_as_uint(value) & 0xFFFF0000u);
}

// Neighbouring fp32 values -> pairs of bf16, part by part; the parts add up to the values.
__device__ __forceinline__ void split_parts(float (&values)[kCount], uint32_t (&parts)[kParts][kCount / 2]) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      parts[part][i] = top_halves(values[2 * i], values[2 * i + 1]);
      values[2 * i] = below_top_half(values[2 * i]);
      values[2 * i + 1] = below_top_half(values[2 * i + 1]);
    }
  }
}

// Where the sum of an output lies among the partial sums: behind the products of `pre` are the squares.
__device__ __forceinline__ int place_of(int output, int streams) {
  return output < streams ? output : output + kSquareSums;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The launch where mixes_many() says so.
cudaError_t launch_hc_mix_many(const MixArguments& arguments, cudaStream_t stream);

}  // namespace dsv4

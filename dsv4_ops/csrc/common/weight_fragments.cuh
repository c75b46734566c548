// Quantised weights as the A operand of mma.sync m16n8k16: 16 rows of a weight by 16 values along k, exact in f16.
//
// A tile is 16 rows by 128 bytes of a weight as it lies in memory, in shared memory with its 16-byte chunks swizzled:
// 64 values of a row in bf16, 128 in E4M3, 256 in E2M1. It comes by copy_tile (cp.async), and load_chunks hands two
// chunks of all rows to a warp: with row = lane / 4 and t = lane % 4, a lane gets
//
//   words[0], words[1]   bytes 4t .. 4t + 3 of `chunk` in rows row and row + 8
//   words[2], words[3]   the same of chunk + 1
//
// The order of k inside a product is free, so what a lane got becomes its part of a fragment without moving, if x gets
// the same order:
//
//   bf16   two chunks (16 values) are a fragment as they are, k in its own order
//   E4M3   a chunk (16 values) is one fragment: a lane's 4 values are the pairs (0, 1) and (2, 3)
//   E2M1   a chunk (32 values) is two fragments: a lane's 8 values are the pairs (0, 4), (1, 5) | (2, 6), (3, 7)
//
// so that of E2M1 weights the x of a lane's 8 values in E4M3 must lie in two chunks of x, as its words
// fp4_order(..)[0] and [1] (see there), and x in f16 in four chunks, one a pair.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/ptx.cuh"

namespace dsv4 {

constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 128;
constexpr int kTileBytes = kTileRows * kTileRowBytes;
constexpr int kTileChunks = kTileRowBytes / 16;

// What the halves of an E2M1 code are worth less than the code: see e2m1_halves and nvfp4_halves.
constexpr float kE2m1HalvesUnit = 0x1p14f;
constexpr float kNvfp4HalvesUnit = 0x1p7f;

// Place of 16-byte chunk `chunk` of row `row` in a tile: eight rows of one chunk lie in different banks.
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  return row * kTileRowBytes + ((chunk ^ (row & 7)) << 4);
}

// One warp starts to copy a tile: `rows` rows (what is beyond them is zeroed) that lie `pitch` bytes apart, of each
// `bytes` bytes (a multiple of 16; zeros beyond). `source` is where the lane's part of the tile begins: row lane / 8,
// chunk lane % 8. The caller commits.
__device__ __forceinline__ void copy_tile(uint8_t* tile, const uint8_t* source, int64_t pitch, int rows, int bytes,
                                          int lane) {
  constexpr int kRowsAtOnce = 32 / kTileChunks;
  const int chunk = lane % kTileChunks, row = lane / kTileChunks;
  const bool inside = chunk * 16 < bytes;
#pragma unroll
  for (int i = 0; i < kTileRows; i += kRowsAtOnce) {
    ptx::cp_async_16(tile + tile_offset(row + i, chunk), source, inside && row + i < rows ? 16 : 0);
    source += kRowsAtOnce * pitch;
  }
}

// The same of a whole tile at `offset` (a multiple of 128) in shared memory; `four_rows` is four times the pitch.
__device__ __forceinline__ void copy_whole_tile(uint8_t* shared, int offset, const uint8_t* source, int64_t four_rows,
                                                int lane) {
  const int even = offset + tile_offset(lane / kTileChunks, lane % kTileChunks);  // rows 0 .. 3 and 8 .. 11
  const int odd = (even ^ 64) + 512;                                             // rows 4 .. 7 and 12 .. 15
  ptx::cp_async_16(shared + even, source, 16);
  ptx::cp_async_16(shared + odd, source + four_rows, 16);
  ptx::cp_async_16(shared + even + 1024, source + 2 * four_rows, 16);
  ptx::cp_async_16(shared + odd + 1024, source + 3 * four_rows, 16);
}

// Chunks `chunk` (even) and chunk + 1 of a tile.
__device__ __forceinline__ void load_chunks(uint32_t (&words)[4], const uint8_t* tile, int chunk, int lane) {
  ptx::ldmatrix_x4(words, tile + tile_offset(lane % kTileRows, chunk + lane / kTileRows));
}

// Four E4M3 codes -> pairs (0, 1) and (2, 3) in f16.
__device__ __forceinline__ void e4m3_halves(uint32_t (&halves)[2], uint32_t codes) { ptx::cvt_half2x2(halves, codes); }

// Eight E2M1 codes -> pairs (0, 4), (1, 5), (2, 6), (3, 7) in f16, each worth 2^-14 of its code: sign, two bits of
// exponent and one of mantissa in the places of those of f16, whose subnormal stands for the code 0.5. Shifts to the
// left become products (IMAD) and take no slot of the pipe of logic, which is the busy one: six of the eleven
// instructions do.
__device__ __forceinline__ void e2m1_halves(uint32_t (&halves)[4], uint32_t codes) {
  constexpr uint32_t kSigns = 0x80808080u, kPair = 0x8E008E00u;
  // What lies between the bits of a code, and the other code of a byte, go with kPair.
  const uint32_t even = ptx::select_bits<kSigns>(codes << 4, codes << 1);
  const uint32_t odd = ptx::select_bits<kSigns>(codes, ptx::mul_hi(codes, 1u << 29));  // codes >> 3
  halves[0] = even << 8 & kPair;
  halves[1] = odd << 8 & kPair;
  halves[2] = even & kPair;
  halves[3] = odd & kPair;
}

// An E4M3 block scale -> both halves of the factor for nvfp4_halves: 2^7 times the scale, exact.
__device__ __forceinline__ __half2 nvfp4_factor(uint32_t scale) {
  const __half2 halves = ptx::cvt_half2(static_cast<uint16_t>(scale | scale << 8));
  return __hmul2_rn(halves, __float2half2_rn(128.0f));
}

// Eight E2M1 codes times their block scale, pairs as above, each worth 2^-7 of the product: exact, for the product has
// at most 6 significant bits and lies in 2^-10 .. 2688. With the scale itself as factor a pair is worth 2^-14: exact
// too, for products are multiples of 2^-10 and the subnormals of f16 multiples of 2^-24.
__device__ __forceinline__ void nvfp4_halves(uint32_t (&halves)[4], uint32_t codes, __half2 factor) {
  e2m1_halves(halves, codes);
#pragma unroll
  for (uint32_t& pair : halves) {
    const __half2 product = __hmul2_rn(reinterpret_cast<const __half2&>(pair), factor);
    pair = reinterpret_cast<const uint32_t&>(product);
  }
}

// Eight E4M3 codes of x in their own order -> the words whose pairs stand against those of e2m1_halves.
__device__ __forceinline__ uint2 fp4_order(uint2 codes) {
  return {__byte_perm(codes.x, codes.y, 0x5140), __byte_perm(codes.x, codes.y, 0x7362)};
}

// The words of one chunk in rows row and row + 8 -> a fragment.
__device__ __forceinline__ void e4m3_fragment(uint32_t (&a)[4], uint32_t upper, uint32_t lower) {
  uint32_t up[2], low[2];
  e4m3_halves(up, upper);
  e4m3_halves(low, lower);
  a[0] = up[0], a[1] = low[0], a[2] = up[1], a[3] = low[1];
}

// The same of E2M1: two fragments; pairs as in e2m1_halves or nvfp4_halves.
__device__ __forceinline__ void fp4_fragments(uint32_t (&a)[2][4], const uint32_t (&up)[4], const uint32_t (&low)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a[i][0] = up[2 * i], a[i][1] = low[2 * i], a[i][2] = up[2 * i + 1], a[i][3] = low[2 * i + 1];
  }
}

}  // namespace dsv4

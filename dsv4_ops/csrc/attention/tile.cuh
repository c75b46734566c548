// Keys and queries as the tensor cores read them, for head dimension 512 = 448 + 64.
//
// A tile of rows (keys or heads) of 512 bf16 lies in shared memory as 8 slabs of 64 dimensions. A slab has 128 bytes a
// row, and the 16-byte chunk c of row r stands at place c ^ (r % 8): the 128-byte swizzle of wgmma, under which a slab
// can be read with dimensions as the inner index of a product (scores) and, transposed, as the outer index (output).
//
// Where dimensions are the rows of the output, sixteen neighbouring ones of slab 7 (rope) stand in the order 0 2 4 ..
// 14, 1 3 .. 15, alike in keys, queries and output: a thread of a product holds rows r and r + 8, which are then a pair
// that rope turns. Tiles of 64 heads (sparse_attention_wide.cu) leave them as they are; the sums are the same.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/ptx_sm90.cuh"

namespace dsv4 {

constexpr int kDim = 512;
constexpr int kRopeDim = 64;
constexpr int kNope = kDim - kRopeDim;
constexpr int kSlab = 64;  // dimensions
constexpr int kSlabs = kDim / kSlab;
constexpr int kRowBytes = kSlab * 2;               // of a row of a slab
constexpr int kNopeChunks = kNope / 8;             // chunks of 16 bytes in a row
constexpr int kEntryBytes = kNope + 2 * kRopeDim;  // of the data part of a packed entry
constexpr int kScaleBytes = 8;

// Byte of chunk `chunk` (0 .. 7) of a row of a slab.
__device__ __forceinline__ uint32_t chunk_offset(uint32_t row, uint32_t chunk) {
  return row * kRowBytes + ((chunk ^ row % 8) * 16);
}

__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// Sixteen dimensions -> the even and the odd ones.
__device__ __forceinline__ void split_pairs(uint4& first, uint4& second) {
  const uint4 a = first, b = second;
  first = {low_halves(a.x, a.y), low_halves(a.z, a.w), low_halves(b.x, b.y), low_halves(b.z, b.w)};
  second = {high_halves(a.x, a.y), high_halves(a.z, a.w), high_halves(b.x, b.y), high_halves(b.z, b.w)};
}

// The inverse of split_pairs.
__device__ __forceinline__ void join_pairs(uint4& first, uint4& second) {
  const uint4 a = first, b = second;
  first = {low_halves(a.x, b.x), high_halves(a.x, b.x), low_halves(a.y, b.y), high_halves(a.y, b.y)};
  second = {low_halves(a.z, b.z), high_halves(a.z, b.z), low_halves(a.w, b.w), high_halves(a.w, b.w)};
}

__device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  const __nv_bfloat162 product = __hmul2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(product);
}

// E4M3 -> bf16: sign and code are moved to the sign and to the low end of the exponent with the mantissa. That is the
// value times 2^-120, subnormal codes included, which become bf16 subnormals: products take them as they are. The
// factor 2^(byte - 7) of a group repairs that and applies its UE8M0 scale 2^(byte - 127), exactly. It exists for bytes
// up to kLargestScale; groups with a larger one (an amax above 57344, or NaN) need a second factor.
constexpr uint32_t kLargestScale = 134;

__device__ __forceinline__ uint32_t first_factor(uint32_t byte) { return byte * 0x00800080u + 0x3C003C00u; }

__device__ __forceinline__ uint32_t second_factor(uint32_t byte) {
  return byte == 255 ? 0x7FC07FC0u : (byte - kLargestScale + 127) * 0x00800080u;
}

// Bits 7, 15, 23, 31 of the bytes above kLargestScale.
__device__ __forceinline__ uint32_t large_scales(uint32_t bytes) {
  return ((bytes & 0x7F7F7F7Fu) + (0x7F - (kLargestScale - 0x80)) * 0x01010101u) & bytes & 0x80808080u;
}

// Four codes -> four bf16.
__device__ __forceinline__ uint2 unpack_e4m3(uint32_t codes, uint32_t factor) {
  constexpr uint32_t kBits = 0x87F087F0u;
  const uint32_t low = ptx::prmt(codes, 0x9180) << 4 & kBits, high = ptx::prmt(codes, 0xB3A2) << 4 & kBits;
  return {multiply_bf16x2(low, factor), multiply_bf16x2(high, factor)};
}

// Sixteen codes -> two chunks.
__device__ __forceinline__ void unpack_e4m3(uint4 codes, uint32_t factor, uint4& first, uint4& second) {
  const uint2 a = unpack_e4m3(codes.x, factor), b = unpack_e4m3(codes.y, factor);
  const uint2 c = unpack_e4m3(codes.z, factor), d = unpack_e4m3(codes.w, factor);
  first = {a.x, a.y, b.x, b.y};
  second = {c.x, c.y, d.x, d.y};
}

__device__ __forceinline__ void multiply_chunk(uint4& chunk, uint32_t factor) {
  chunk = {multiply_bf16x2(chunk.x, factor), multiply_bf16x2(chunk.y, factor), multiply_bf16x2(chunk.z, factor),
           multiply_bf16x2(chunk.w, factor)};
}

}  // namespace dsv4

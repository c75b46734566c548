// Keys and queries as the tensor cores read them, for head dimension 512 = 448 + 64.
//
// A tile of rows (keys or heads) of 512 bf16 lies in shared memory as 8 slabs of 64 dimensions. A slab has 128 bytes a row,
// and the 16-byte chunk c of row r stands at place c ^ (r % 8): the 128-byte swizzle of wgmma, under which a slab can be
// read with dimensions as the inner index of a product (scores) and, transposed, as the outer index (output).
//
// Dimensions are permuted within a slab, alike in keys, queries and output, so that unpacking is cheap:
//   slabs 0 .. 6   four neighbouring dimensions 0 1 2 3 stand in the order 0 2 1 3: two shifts split a word of four E4M3
//                  codes into the pairs (0, 2) and (1, 3);
//   slab 7 (rope)  sixteen neighbouring dimensions stand in the order 0 2 4 .. 14, 1 3 .. 15: a thread of a product holds
//                  rows r and r + 8, which are then a pair that rope turns.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace dsv4 {

constexpr int kDim = 512;
constexpr int kRopeDim = 64;
constexpr int kNope = kDim - kRopeDim;
constexpr int kSlab = 64;                  // dimensions
constexpr int kSlabs = kDim / kSlab;
constexpr int kRowBytes = kSlab * 2;       // of a row of a slab
constexpr int kNopeChunks = kNope / 8;     // chunks of 16 bytes in a row
constexpr int kEntryBytes = kNope + 2 * kRopeDim;  // of the data part of a packed entry
constexpr int kScaleBytes = 8;

// Byte of chunk `chunk` (0 .. 7) of a row of a slab.
__device__ __forceinline__ uint32_t chunk_offset(uint32_t row, uint32_t chunk) {
  return row * kRowBytes + ((chunk ^ row % 8) * 16);
}

__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// 0 1 2 3 -> 0 2 1 3 in both fours of a chunk; its own inverse.
__device__ __forceinline__ uint4 swap_middle(uint4 v) {
  return {low_halves(v.x, v.y), high_halves(v.x, v.y), low_halves(v.z, v.w), high_halves(v.z, v.w)};
}

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

// What brings E4M3 codes that were moved into the place of bf16's exponent and mantissa to their values. Such a number is
// the code's value times 2^-120, subnormal codes included (they become bf16 subnormals, which products take). A factor of
// 2^(byte - 7) repairs that and applies the UE8M0 scale 2^(byte - 127), exactly. It exists for bytes up to 134; a group
// with a larger scale (an amax above 57344, or NaN) is multiplied twice.
struct GroupScale {
  uint32_t factor;  // twice, as bf16
  uint32_t byte;

  __device__ __forceinline__ explicit GroupScale(uint32_t scale_byte)
      : factor((min(scale_byte, kLargest) + 120) * 0x00800080u), byte(scale_byte) {}

  __device__ __forceinline__ bool large() const { return byte > kLargest; }
  __device__ __forceinline__ uint32_t second_factor() const {
    return byte == 255 ? 0x7FC07FC0u : (byte - kLargest + 127) * 0x00800080u;
  }

  static constexpr uint32_t kLargest = 134;
};

// Four codes -> four bf16 in the order 0 2 1 3.
__device__ __forceinline__ uint2 unpack_e4m3(uint32_t codes, uint32_t factor) {
  constexpr uint32_t kSign = 0x80008000u, kMagnitude = 0x07F007F0u;
  const uint32_t even = ((codes << 8) & kSign) | ((codes << 4) & kMagnitude);
  const uint32_t odd = (codes & kSign) | ((codes >> 4) & kMagnitude);
  return {multiply_bf16x2(even, factor), multiply_bf16x2(odd, factor)};
}

// Sixteen codes -> two chunks.
__device__ __forceinline__ void unpack_e4m3(uint4 codes, const GroupScale& scale, uint4& first, uint4& second) {
  const uint2 a = unpack_e4m3(codes.x, scale.factor), b = unpack_e4m3(codes.y, scale.factor);
  const uint2 c = unpack_e4m3(codes.z, scale.factor), d = unpack_e4m3(codes.w, scale.factor);
  first = {a.x, a.y, b.x, b.y};
  second = {c.x, c.y, d.x, d.y};
  if (!scale.large()) return;
  const uint32_t factor = scale.second_factor();
  for (uint32_t* word : {&first.x, &first.y, &first.z, &first.w, &second.x, &second.y, &second.z, &second.w}) {
    *word = multiply_bf16x2(*word, factor);
  }
}

}  // namespace dsv4

// How a product is cut: host code, the same for launchers and bind.cpp.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gemm/gemm.h"

namespace dsv4 {

constexpr int kWarps = 8;          // of a CTA
constexpr int kMostRanges = 8;     // parts of k that are summed apart: a power of two
constexpr int kSms = 132;          // of an H200
constexpr int64_t kWideRows = 25600;   // rows (times ranges) with which every SM has a warp tile of 32 rows a warp
constexpr int kPieceBytes = 128;   // of a weight row: what a warp takes at a time

struct FormatShape {
  int piece_values;    // values of a weight row in 128 bytes
  int x_piece_bytes;   // what the x of so many values takes in shared memory
  int scale_bytes;     // weight scales of a row in a piece that come with it
  int weight_align;    // values whose multiple k must be, so that pieces and scales can be copied
};

constexpr FormatShape shape_of(Format format) {
  switch (format) {
    case Format::kDense: return {64, 128, 0, 8};
    case Format::kFp8: return {128, 128, 0, 32};
    case Format::kMxfp4: return {256, 256, 8, 128};
    case Format::kW8a16: return {128, 256, 0, 16};
    default: return {256, 512, 16, 64};
  }
}

// Bytes of an element of x and of the weight, as they are stored.
constexpr int64_t x_bytes(Format format) { return format == Format::kDense || format == Format::kW8a16 ? 2 : 1; }
constexpr int64_t weight_bytes(Format format) { return format == Format::kDense ? 2 : 1; }

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int pieces_of(Format format, const Product& product) {
  return static_cast<int>(ceil_divide(product.k, shape_of(format).piece_values));
}

// Parts of k whose sums are added in the end: so many that 132 SMs have work, by the widths alone, so that the sum of a
// row does not depend on the number of rows. Narrow products have more, so that x of 64 tokens fits beside a range.
inline int ranges_of(Format format, const Product& product) {
  const int pieces = pieces_of(format, product);
  const int64_t rows = product.groups * product.rows;
  const int64_t resident = (int64_t{1} << 17) / kTokensAtOnce / shape_of(format).x_piece_bytes;
  int ranges = 1;
  const auto more = [&] { return rows * ranges < kWideRows || (rows < kWideRows && pieces > ranges * resident); };
  while (ranges < kMostRanges && 2 * ranges <= pieces && more()) ranges *= 2;
  return ranges;
}

// Whether the kernels of stream.cuh take the operands: 16 bytes of a row are copied at a time, 4 of FP4 scales.
inline bool can_stream(Format format, const Product& p) {
  const int64_t of_x = x_bytes(format), of_weight = weight_bytes(format);
  const auto aligned = [](const void* data, int64_t distance, int64_t to) {
    return reinterpret_cast<uintptr_t>(data) % to == 0 && distance % to == 0;
  };
  if (p.k == 0 || p.k % shape_of(format).weight_align != 0) return false;
  // Rows, and the distances between them, are 32-bit numbers.
  const int64_t longest =
      std::max({p.weight_stride * of_weight, p.x_stride * p.groups * of_x, p.x_scale_stride * p.groups});
  if (longest > INT32_MAX || p.groups * p.rows > INT32_MAX) return false;
  if (!aligned(p.x, p.x_stride * of_x, 16) || !aligned(p.weight, p.weight_stride * of_weight, 16)) return false;
  if (format == Format::kDense) return p.x_dtype == Dtype::kBf16 && p.weight_dtype == Dtype::kBf16;
  // A warp's rows, 16 or 32 of a group, lie in one block of FP8 scales.
  if (format == Format::kFp8 || format == Format::kW8a16) return p.groups == 1 || p.rows % 32 == 0;
  return aligned(p.weight_scale, p.weight_scale_stride, 4);
}

// Up to 8 tokens a CTA holds all ranges of its rows; beyond, a range of more rows, and another launch adds the ranges.
inline bool splits_ranges(int64_t tokens, int ranges) { return tokens > kFewTokens && ranges > 1; }

}  // namespace dsv4

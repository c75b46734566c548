// What the streaming products (stream.cuh, wide_stream.cuh) share: what a launch decides, and how sums are stored.
#pragma once

#include "common/divisor.cuh"
#include "common/launch.cuh"
#include "common/weight_fragments.cuh"
#include "gemm/epilogue.cuh"

namespace dsv4 {

constexpr int kThreads = 32 * kWarps;
constexpr int kMostShared = 227 * 1024, kMostOfTwo = 113 * 1024;  // of a CTA, and of each of two on an SM

// What a launch of a streaming product decides; the same for all CTAs. Distances in bytes.
struct Stream {
  Product product;
  int64_t first_token;
  int tokens;          // of this launch
  int range_shift;     // log2 of the ranges of k
  int pieces;          // of a weight row
  int whole_pieces;
  int row_bytes;       // of the weight
  int row_pitch;       // from one row to the next
  int tiles;           // of a CTA's rows, in a group
  int tiles_of_cta;
  int window;          // pieces of a range whose x is in shared memory
  int x_pitch;         // of a token in a window
  int x_step;          // from a token to the next in memory, and its scales
  int x_scale_step;
  int x_groups;        // scale groups of x in a window
  int x_group_shift;   // log2 of their size; 0 without such groups
  int scale_tokens;    // tokens with a place for scales: even
  Divisor units = Divisor(1);  // 16 bytes of x, in a window of a token
  Divisor scale_tokens_divisor = Divisor(1);

  __device__ __forceinline__ int first_piece(int range) const { return (range * pieces) >> range_shift; }
};

// What all launches decide alike; tiles, windows and the rest of x are the kernel's own.
inline Stream plan_stream(Format format, const Product& product, int64_t first_token, int tokens) {
  Stream plan{};
  plan.product = product;
  plan.tokens = tokens;
  plan.x_group_shift = product.x_group > 0 ? 5 + product.x_group / 64 : 0;
  plan.first_token = first_token;
  const int ranges = ranges_of(format, product);
  while (1 << plan.range_shift < ranges) ++plan.range_shift;
  plan.pieces = pieces_of(format, product);
  const int64_t bytes = weight_bytes(format);
  plan.row_bytes = static_cast<int>(format == Format::kMxfp4 || format == Format::kNvfp4 ? product.k / 2
                                                                                         : product.k * bytes);
  plan.row_pitch = static_cast<int>(product.weight_stride * bytes);
  plan.x_step = static_cast<int>(product.groups * product.x_stride * x_bytes(format));
  plan.x_scale_step = static_cast<int>(product.groups * product.x_scale_stride);
  plan.scale_tokens = (tokens + 1) / 2 * 2;
  plan.scale_tokens_divisor = Divisor(plan.scale_tokens);
  plan.whole_pieces = plan.row_bytes / kTileRowBytes;
  return plan;
}

using StreamKernel = void (*)(Stream);

// Launch `kernel` for all tiles of `plan`; where that does not say how many a CTA takes, no more CTAs than run at once.
// Two CTAs an SM where they fit: eight warps alone leave more than half of the issue slots empty.
inline cudaError_t launch_tiles(StreamKernel kernel, Stream plan, int64_t columns, int64_t shared, int ctas_of_sm,
                                cudaStream_t stream) {
  const int64_t ctas = shared <= kMostOfTwo ? ctas_of_sm * kSms : kSms, groups = plan.product.groups;
  if (plan.tiles_of_cta == 0) plan.tiles_of_cta = static_cast<int>(ceil_divide(plan.tiles * columns * groups, ctas));
  const dim3 grid(static_cast<unsigned>(ceil_divide(plan.tiles, plan.tiles_of_cta)), static_cast<unsigned>(columns),
                  static_cast<unsigned>(groups));
  const cudaError_t status = take_all_shared_memory(reinterpret_cast<const void*>(kernel));
  if (status != cudaSuccess) return status;
  return launch_kernel(kernel, {grid, dim3(kThreads), stream, static_cast<size_t>(shared)}, plan);
}

// Store a warp's sums of rows `first_row` .. of a group: y, or, `partial`, the sums of range blockIdx.y.
template <Format kFormat, int kTiles, int kTokenTiles>
__device__ __forceinline__ void store_sums(const Stream& s, const float (&total)[kTiles][kTokenTiles][4],
                                           int64_t first_row, bool partial) {
  const Product& p = s.product;
  const int lane = threadIdx.x % 32;
  const int64_t row = first_row + lane / 4;
  const int first_token = lane % 4 * 2, tokens = s.tokens - first_token;
  const int rows = static_cast<int>(max(int64_t{0}, min(p.rows - row, int64_t{kTiles * kTileRows})));  // from `row` on
  const auto for_all = [&](auto store_sum) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        if (n * 8 + odd >= tokens) continue;
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
          if (i * 8 < rows) store_sum(n * 8 + odd, i * 8, total[i / 2][n][i % 2 * 2 + odd]);
        }
      }
    }
  };
  const int64_t pitch = p.groups * p.rows;
  if (partial) {
    float* const sums = p.partials + (blockIdx.y * s.tokens + first_token) * pitch + blockIdx.z * p.rows + row;
    for_all([&](int token, int offset, float sum) { sums[token * pitch + offset] = sum; });
    return;
  }
  const int64_t x_row = (s.first_token + first_token) * p.groups + blockIdx.z;
  const auto store_as = [&](auto* y) {
    y += x_row * p.rows + row;
    for_all([&](int token, int offset, float sum) {
      y[token * pitch + offset] = finish_product<kFormat>(p, x_row + token * p.groups, sum);
    });
  };
  if (p.y_dtype == Dtype::kBf16) {
    store_as(static_cast<__nv_bfloat16*>(p.y));  // assignment rounds to nearest even
  } else {
    store_as(static_cast<float*>(p.y));
  }
}

}  // namespace dsv4

// Launch of a streaming product: how it is cut, and what its CTAs hold of x.
#pragma once

#include "common/launch.cuh"
#include "gemm/stream.cuh"

namespace dsv4 {

// Launch `kernel` for up to 64 tokens.
template <Format kFormat, int kTokenTiles>
cudaError_t launch_stream(void (*kernel)(Stream), const Product& product, int64_t first_token, int tokens,
                          cudaStream_t stream) {
  using Kernel = StreamingProduct<kFormat, kTokenTiles>;
  constexpr int kMostShared = 227 * 1024, kMostOfTwo = 113 * 1024;  // of a CTA, and of each of two on an SM
  Stream plan{};
  plan.product = product;
  plan.tokens = tokens;
  plan.x_group_shift = product.x_group > 0 ? 5 + product.x_group / 64 : 0;
  plan.first_token = first_token;
  const int ranges = ranges_of(kFormat, product);
  while (1 << plan.range_shift < ranges) ++plan.range_shift;
  plan.pieces = pieces_of(kFormat, product);
  constexpr bool kSplit = Kernel::kSplit;
  const int ranges_here = kSplit ? 1 : ranges;
  const int64_t rows = kSplit ? 2 * kTileRows * kWarps : kTileRows * (kWarps / ranges_here);
  plan.tiles = static_cast<int>(ceil_divide(product.rows, rows));
  const int64_t columns = kSplit ? ranges : 1;
  const int64_t bytes = kFormat == Format::kDense ? 2 : 1;
  plan.row_bytes = static_cast<int>(kFormat == Format::kMxfp4 || kFormat == Format::kNvfp4 ? product.k / 2
                                                                                         : product.k * bytes);
  plan.row_pitch = static_cast<int>(product.weight_stride * bytes);
  plan.x_step = static_cast<int>(product.groups * product.x_stride * bytes);
  plan.x_scale_step = static_cast<int>(product.groups * product.x_scale_stride);
  plan.scale_tokens = (tokens + 1) / 2 * 2;
  plan.scale_tokens_divisor = Divisor(plan.scale_tokens);
  plan.whole_pieces = plan.row_bytes / kTileRowBytes;
  int window = static_cast<int>(ceil_divide(plan.pieces, ranges));
  while (window > 1 && Kernel::kFixedBytes + Kernel::plan_x(plan, ranges_here, window) > kMostShared) {
    window = (window + 1) / 2;
  }
  const int64_t shared = Kernel::kFixedBytes + Kernel::plan_x(plan, ranges_here, window);
  // Two CTAs an SM where they fit: eight warps alone leave more than half of the issue slots empty.
  const int64_t ctas = shared <= kMostOfTwo ? Kernel::kCtasOfAnSm * kSms : kSms;
  plan.tiles_of_cta = static_cast<int>(ceil_divide(plan.tiles * columns * product.groups, ctas));
  const dim3 grid(static_cast<unsigned>(ceil_divide(plan.tiles, plan.tiles_of_cta)), static_cast<unsigned>(columns),
                  static_cast<unsigned>(product.groups));
  const cudaError_t status = take_all_shared_memory(reinterpret_cast<const void*>(kernel));
  if (status != cudaSuccess) return status;
  return launch_kernel(kernel, {grid, dim3(kThreads), stream, static_cast<size_t>(shared)}, plan);
}

}  // namespace dsv4

// Products that the streaming kernels do not take: fp32 operands, rows that do not start at multiples of 16 bytes, FP4
// scales that cannot be copied four at a time, groups whose rows straddle FP8 blocks. A warp owns an element of y: its
// lanes take every 32nd value of k, in fp32, and their sums are added in a tree, so a row has the same bits in any
// batch. Correct for anything, not fast: a weight is read again for every token.
#include "common/launch.cuh"
#include "common/number_formats.cuh"
#include "gemm/epilogue.cuh"

namespace dsv4 {
namespace {

constexpr int kPlainWarps = 8;
constexpr unsigned kMostTokensInGrid = 65535;

__device__ __forceinline__ float dense_value(const void* values, Dtype dtype, int64_t at) {
  return dtype == Dtype::kBf16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(values)[at])
                               : static_cast<const float*>(values)[at];
}

__device__ __forceinline__ float packed_value(const void* values, int64_t row, int64_t k) {
  return decode_e2m1(static_cast<const uint8_t*>(values)[row + k / 2] >> k % 2 * 4 & 15);
}

// Value k of row `row` of x, without the global scale.
template <Format kFormat>
__device__ __forceinline__ float x_value(const Product& p, int64_t row, int64_t k) {
  if constexpr (kFormat == Format::kDense || kFormat == Format::kW8a16) {
    return dense_value(p.x, p.x_dtype, row * p.x_stride + k);
  } else if constexpr (kFormat == Format::kNvfp4) {
    const float scale = decode_e4m3(p.x_scale[row * p.x_scale_stride + k / 16]);
    return __fmul_rn(packed_value(p.x, row * p.x_stride, k), scale);
  } else {
    const float scale = decode_ue8m0(p.x_scale[row * p.x_scale_stride + k / p.x_group]);
    return __fmul_rn(decode_e4m3(static_cast<const uint8_t*>(p.x)[row * p.x_stride + k]), scale);
  }
}

// Value k of row `row` of the weight, without the global scale.
template <Format kFormat>
__device__ __forceinline__ float weight_value(const Product& p, int64_t row, int64_t k) {
  const auto* const scales = static_cast<const uint8_t*>(p.weight_scale);
  if constexpr (kFormat == Format::kDense) {
    return dense_value(p.weight, p.weight_dtype, row * p.weight_stride + k);
  } else if constexpr (kFormat == Format::kFp8 || kFormat == Format::kW8a16) {
    const int64_t block = row / 128 * p.weight_scale_stride + k / 128;
    const float scale =
        p.fp32_weight_scale ? static_cast<const float*>(p.weight_scale)[block] : decode_ue8m0(scales[block]);
    const float value = __fmul_rn(decode_e4m3(static_cast<const uint8_t*>(p.weight)[row * p.weight_stride + k]), scale);
    return kFormat == Format::kFp8 ? value : __bfloat162float(__float2bfloat16_rn(value));
  } else if constexpr (kFormat == Format::kMxfp4) {
    const float scale = decode_ue8m0(scales[row * p.weight_scale_stride + k / 32]);
    return __fmul_rn(packed_value(p.weight, row * p.weight_stride, k), scale);
  } else {
    const float scale = decode_e4m3(scales[row * p.weight_scale_stride + k / 16]);
    return __fmul_rn(packed_value(p.weight, row * p.weight_stride, k), scale);
  }
}

template <Format kFormat>
__global__ void __launch_bounds__(32 * kPlainWarps) linear_plain_kernel(const __grid_constant__ Product p) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kPlainWarps + threadIdx.x / 32;
  if (row >= p.groups * p.rows) return;
  for (int64_t token = blockIdx.y; token < p.tokens; token += gridDim.y) {
    const int64_t x_row = token * p.groups + row / p.rows;
    float sum = 0.0f;
    for (int64_t first = 0; first < p.k; first += 32) {
      const int64_t k = first + lane;
      if (k < p.k) sum = __fmaf_rn(x_value<kFormat>(p, x_row, k), weight_value<kFormat>(p, row, k), sum);
    }
    __syncwarp();
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
    if constexpr (kFormat == Format::kNvfp4) {
      sum = __fmul_rn(sum, __fmul_rn(p.x_global[x_row * p.x_global_stride], *p.weight_global));
    }
    const int64_t at = token * p.groups * p.rows + row;
    if (lane == 0) store_rounded(p, at, sum);
  }
}

}  // namespace

cudaError_t launch_linear_plain(Format format, const Product& product, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(ceil_divide(product.groups * product.rows, kPlainWarps));
  const auto tokens = static_cast<unsigned>(std::min<int64_t>(product.tokens, kMostTokensInGrid));
  const Launch at{dim3(rows, tokens), dim3(32 * kPlainWarps), stream};
  switch (format) {
    case Format::kDense: return launch_kernel(linear_plain_kernel<Format::kDense>, at, product);
    case Format::kFp8: return launch_kernel(linear_plain_kernel<Format::kFp8>, at, product);
    case Format::kMxfp4: return launch_kernel(linear_plain_kernel<Format::kMxfp4>, at, product);
    case Format::kW8a16: return launch_kernel(linear_plain_kernel<Format::kW8a16>, at, product);
    default: return launch_kernel(linear_plain_kernel<Format::kNvfp4>, at, product);
  }
}

}  // namespace dsv4

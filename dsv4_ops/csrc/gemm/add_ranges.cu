// Adds the sums of ranges of k that a stream (stream.cuh) of 9 to 64 tokens left in the workspace [range][token][N],
// applies global scales and rounds to y. A thread owns four neighbouring elements of y, or one where rows of the weight
// or y do not allow it.
//
// Floor: the sums, from L2 where they have just been written: 4 bytes times ranges an element.
#include "common/launch.cuh"
#include "gemm/epilogue.cuh"

namespace dsv4 {
namespace {

constexpr int kAddThreads = 256;

// y[at] .. = values, rounded to the dtype of y.
__device__ __forceinline__ void store_four(const Product& p, int64_t at, const float (&values)[4]) {
  if (p.y_dtype == Dtype::kBf16) {
    const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(values[0], values[1]),
                                     __floats2bfloat162_rn(values[2], values[3])};
    *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(p.y) + at) = *reinterpret_cast<const uint2*>(pairs);
  } else {
    *reinterpret_cast<float4*>(static_cast<float*>(p.y) + at) = {values[0], values[1], values[2], values[3]};
  }
}

template <Format kFormat, int kColumns>
__global__ void __launch_bounds__(kAddThreads)
    add_ranges_kernel(const __grid_constant__ Product p, int64_t first_token, int tokens, int ranges) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t columns = p.groups * p.rows;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x) * kColumns;
  if (column >= columns) return;
  const int64_t token = blockIdx.y, row = (first_token + token) * p.groups + column / p.rows;
  const float* const sums = p.partials + token * columns + column;
  if constexpr (kColumns == 1) {
    store_product<kFormat>(p, row, column % p.rows, add_ranges(ranges, sums, tokens * columns));
  } else {
    float4 four[kMostRanges];
#pragma unroll
    for (int i = 0; i < kMostRanges; ++i) {
      four[i] = i < ranges ? *reinterpret_cast<const float4*>(sums + i * tokens * columns) : float4{};
    }
    float values[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float of_column[kMostRanges];
#pragma unroll
      for (int i = 0; i < kMostRanges; ++i) of_column[i] = reinterpret_cast<const float*>(&four[i])[j];
      values[j] = finish_product<kFormat>(p, row, sum_of_ranges(of_column));
    }
    store_four(p, (first_token + token) * columns + column, values);
  }
}

template <Format kFormat>
cudaError_t launch(const Product& product, int64_t first_token, int tokens, int ranges, cudaStream_t stream) {
  const auto launch_columns = [&](auto kernel, int columns) {
    const int64_t ctas = ceil_divide(product.groups * product.rows, columns * kAddThreads);
    const Launch at{dim3(static_cast<unsigned>(ctas), tokens), dim3(kAddThreads), stream};
    const cudaError_t status = take_all_shared_memory(reinterpret_cast<const void*>(kernel));
    return status != cudaSuccess ? status : launch_kernel(kernel, at, product, first_token, tokens, ranges);
  };
  const bool in_fours = product.rows % 4 == 0 && reinterpret_cast<uintptr_t>(product.y) % 16 == 0;
  return in_fours ? launch_columns(add_ranges_kernel<kFormat, 4>, 4) : launch_columns(add_ranges_kernel<kFormat, 1>, 1);
}

}  // namespace

cudaError_t launch_add_ranges(Format format, const Product& product, int64_t first_token, int tokens, int ranges,
                              cudaStream_t stream) {
  switch (format) {
    case Format::kDense:
    case Format::kW8a16: return launch<Format::kDense>(product, first_token, tokens, ranges, stream);
    case Format::kFp8: return launch<Format::kFp8>(product, first_token, tokens, ranges, stream);
    case Format::kMxfp4: return launch<Format::kMxfp4>(product, first_token, tokens, ranges, stream);
    default: return launch<Format::kNvfp4>(product, first_token, tokens, ranges, stream);
  }
}

}  // namespace dsv4

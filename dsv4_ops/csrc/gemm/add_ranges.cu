// Adds the sums of ranges of k that a stream (stream.cuh) of 9 to 64 tokens left in the workspace [range][token][N],
// applies global scales and rounds to y. A thread owns an element of y.
//
// Floor: the sums, from L2 where they have just been written: 4 bytes times ranges an element.
#include "common/launch.cuh"
#include "gemm/epilogue.cuh"

namespace dsv4 {
namespace {

constexpr int kAddThreads = 256;

template <Format kFormat>
__global__ void __launch_bounds__(kAddThreads)
    add_ranges_kernel(const __grid_constant__ Product p, int64_t first_token, int tokens, int ranges) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t columns = p.groups * p.rows;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
  if (column >= columns) return;
  const int64_t token = blockIdx.y;
  const float sum = add_ranges(ranges, p.partials + token * columns + column, tokens * columns);
  store_product<kFormat>(p, (first_token + token) * p.groups + column / p.rows, column % p.rows, sum);
}

}  // namespace

cudaError_t launch_add_ranges(Format format, const Product& product, int64_t first_token, int tokens, int ranges,
                              cudaStream_t stream) {
  const int64_t ctas = ceil_divide(product.groups * product.rows, kAddThreads);
  const Launch at{dim3(static_cast<unsigned>(ctas), tokens), dim3(kAddThreads), stream};
  const auto launch = [&](auto kernel) {
    const cudaError_t status = take_all_shared_memory(reinterpret_cast<const void*>(kernel));
    return status != cudaSuccess ? status : launch_kernel(kernel, at, product, first_token, tokens, ranges);
  };
  switch (format) {
    case Format::kDense: return launch(add_ranges_kernel<Format::kDense>);
    case Format::kFp8: return launch(add_ranges_kernel<Format::kFp8>);
    case Format::kMxfp4: return launch(add_ranges_kernel<Format::kMxfp4>);
    default: return launch(add_ranges_kernel<Format::kNvfp4>);
  }
}

}  // namespace dsv4

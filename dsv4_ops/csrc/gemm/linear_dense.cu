// bf16 weights and activations.
// See stream.cuh for what a CTA owns and what bounds it.
#include "gemm/stream.cuh"

namespace dsv4 {
namespace {

template <int kTokenTiles>
__global__ void __launch_bounds__(kThreads, (StreamingProduct<Format::kDense, kTokenTiles>::kCtasOfAnSm))
    stream_dense_kernel(const __grid_constant__ Stream plan) {
  extern __shared__ __align__(128) uint8_t shared[];
  StreamingProduct<Format::kDense, kTokenTiles> product(plan, shared);
  product.prefetch();
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  product.run();
}

}  // namespace

cudaError_t launch_stream_dense(const Product& product, int64_t first_token, int tokens, cudaStream_t stream) {
  constexpr StreamKernels kKernels{stream_dense_kernel<1>, stream_dense_kernel<2>, stream_dense_kernel<4>,
                                   stream_dense_kernel<8>};
  return launch_stream<Format::kDense>(kKernels, product, first_token, tokens, stream);
}

}  // namespace dsv4

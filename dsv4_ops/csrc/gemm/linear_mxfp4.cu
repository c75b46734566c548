// E2M1 weights with a UE8M0 scale for each 32 values, E4M3 activations: the sum of 32 values is scaled and added in
// fp32.
// See stream.cuh for what a CTA owns and what bounds it.
#include "gemm/stream.cuh"

namespace dsv4 {
namespace {

template <int kTokenTiles>
__global__ void __launch_bounds__(kThreads, (StreamingProduct<Format::kMxfp4, kTokenTiles>::kCtasOfAnSm))
    stream_mxfp4_kernel(const __grid_constant__ Stream plan) {
  extern __shared__ __align__(128) uint8_t shared[];
  StreamingProduct<Format::kMxfp4, kTokenTiles> product(plan, shared);
  product.prefetch();
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  product.run();
}

}  // namespace

cudaError_t launch_stream_mxfp4(const Product& product, int64_t first_token, int tokens, cudaStream_t stream) {
  constexpr StreamKernels kKernels{stream_mxfp4_kernel<1>, stream_mxfp4_kernel<2>, stream_mxfp4_kernel<4>,
                                   stream_mxfp4_kernel<8>};
  return launch_stream<Format::kMxfp4>(kKernels, product, first_token, tokens, stream);
}

}  // namespace dsv4

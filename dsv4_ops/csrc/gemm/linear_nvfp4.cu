// E2M1 weights and activations with an E4M3 scale for each 16 values: exact in f16 with their scales. Global scales are
// applied to the sum.
// See stream.cuh for what a CTA owns and what bounds it.
#include "gemm/stream.cuh"

namespace dsv4 {
namespace {

template <int kTokenTiles>
__global__ void __launch_bounds__(kThreads, (StreamingProduct<Format::kNvfp4, kTokenTiles>::kCtasOfAnSm))
    stream_nvfp4_kernel(const __grid_constant__ Stream plan) {
  extern __shared__ __align__(128) uint8_t shared[];
  StreamingProduct<Format::kNvfp4, kTokenTiles> product(plan, shared);
  product.prefetch();
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  product.run();
}

}  // namespace

cudaError_t launch_stream_nvfp4(const Product& product, int64_t first_token, int tokens, cudaStream_t stream) {
  constexpr StreamKernels kKernels{stream_nvfp4_kernel<1>, stream_nvfp4_kernel<2>, stream_nvfp4_kernel<4>,
                                   stream_nvfp4_kernel<8>};
  return launch_stream<Format::kNvfp4>(kKernels, product, first_token, tokens, stream);
}

}  // namespace dsv4

// E4M3 weights with a UE8M0 scale for each 128 x 128 block, bf16 activations: weights become bf16 in registers, so that
// they are read from memory as they are stored and a product has the bits of linear_dense with the converted weight (if
// k is a multiple of 1024, where both are cut alike).
// See stream.cuh for what a CTA owns and what bounds it.
#include "gemm/stream.cuh"

namespace dsv4 {
namespace {

template <int kTokenTiles>
__global__ void __launch_bounds__(kThreads, (StreamingProduct<Format::kW8a16, kTokenTiles>::kCtasOfAnSm))
    stream_w8a16_kernel(const __grid_constant__ Stream plan) {
  extern __shared__ __align__(128) uint8_t shared[];
  StreamingProduct<Format::kW8a16, kTokenTiles> product(plan, shared);
  product.prefetch();
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  product.run();
}

}  // namespace

cudaError_t launch_stream_w8a16(const Product& product, int64_t first_token, int tokens, cudaStream_t stream) {
  constexpr Format kFormat = Format::kW8a16;
  if (tokens <= 8) return launch_stream<kFormat, 1>(stream_w8a16_kernel<1>, product, first_token, tokens, stream);
  if (tokens <= 16) return launch_stream<kFormat, 2>(stream_w8a16_kernel<2>, product, first_token, tokens, stream);
  if (tokens <= 32) return launch_stream<kFormat, 4>(stream_w8a16_kernel<4>, product, first_token, tokens, stream);
  return launch_stream<kFormat, 8>(stream_w8a16_kernel<8>, product, first_token, tokens, stream);
}

}  // namespace dsv4

// E4M3 weights with a UE8M0 scale for each 128 x 128 block, bf16 activations: weights become bf16 in registers, so that
// they are read from memory as they are stored and a product has the bits of linear_dense with the converted weight (if
// k is a multiple of 1024, where both are cut alike).
// See stream.cuh, and wide_stream.cuh for 9 to 64 tokens on Hopper, for what a CTA owns and what bounds it.
#include "common/device.h"
#include "gemm/stream.cuh"
#include "gemm/wide_stream.cuh"

namespace dsv4 {
namespace {

template <int kTokenTiles>
__global__ void __launch_bounds__(kThreads, (StreamingProduct<Format::kW8a16, kTokenTiles>::kCtasOfAnSm))
    stream_w8a16_kernel(const __grid_constant__ Stream plan) {
  extern __shared__ __align__(1024) uint8_t shared[];
  StreamingProduct<Format::kW8a16, kTokenTiles> product(plan, shared);
  product.prefetch();
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  product.run();
}

template <int kTokens, int kTiles>
__global__ void __launch_bounds__(kThreads, (WideShape<kTokens, kTiles>::kCtasOfAnSm))
    wide_stream_w8a16_kernel(const __grid_constant__ Stream plan) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  WideProduct<Format::kW8a16, kTokens, kTiles> product(plan, shared);
  product.prefetch();
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  product.run();
#endif
}

}  // namespace

cudaError_t launch_stream_w8a16(const Product& product, int64_t first_token, int tokens, cudaStream_t stream) {
  if (tokens > kFewTokens && on_hopper()) {
    constexpr WideKernels kWide{.of16 = wide_stream_w8a16_kernel<16, 1>,
                                .half_of32 = wide_stream_w8a16_kernel<32, 1>,
                                .of32 = wide_stream_w8a16_kernel<32, 2>,
                                .half_of64 = wide_stream_w8a16_kernel<64, 1>,
                                .of64 = wide_stream_w8a16_kernel<64, 2>};
    return launch_wide<Format::kW8a16>(kWide, product, first_token, tokens, stream);
  }
  constexpr StreamKernels kKernels{stream_w8a16_kernel<1>, stream_w8a16_kernel<2>, stream_w8a16_kernel<4>,
                                   stream_w8a16_kernel<8>};
  return launch_stream<Format::kW8a16>(kKernels, product, first_token, tokens, stream);
}

}  // namespace dsv4

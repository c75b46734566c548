// E4M3 weights with a scale (UE8M0 or fp32) for each 128 x 128 block, E4M3 activations with a UE8M0 scale for each
// group of 32, 64 or 128: the sum of a group is scaled and added in fp32.
// See stream.cuh, and wide_stream.cuh for 9 to 64 tokens on Hopper, for what a CTA owns and what bounds it.
#include "common/device.h"
#include "gemm/stream.cuh"
#include "gemm/wide_stream.cuh"

namespace dsv4 {
namespace {

template <int kTokenTiles>
__global__ void __launch_bounds__(kThreads, (StreamingProduct<Format::kFp8, kTokenTiles>::kCtasOfAnSm))
    stream_fp8_kernel(const __grid_constant__ Stream plan) {
  extern __shared__ __align__(1024) uint8_t shared[];
  StreamingProduct<Format::kFp8, kTokenTiles> product(plan, shared);
  product.prefetch();
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  product.run();
}

template <int kTokens, int kTiles>
__global__ void __launch_bounds__(kThreads, (WideShape<kTokens, kTiles>::kCtasOfAnSm))
    wide_stream_fp8_kernel(const __grid_constant__ Stream plan) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  WideProduct<Format::kFp8, kTokens, kTiles> product(plan, shared);
  product.prefetch();
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  product.run();
#endif
}

}  // namespace

cudaError_t launch_stream_fp8(const Product& product, int64_t first_token, int tokens, cudaStream_t stream) {
  if (tokens > kFewTokens && on_hopper()) {
    constexpr WideKernels kWide{.of16 = wide_stream_fp8_kernel<16, 1>,
                                .half_of32 = wide_stream_fp8_kernel<32, 1>,
                                .of32 = wide_stream_fp8_kernel<32, 2>,
                                .half_of64 = wide_stream_fp8_kernel<64, 1>,
                                .of64 = wide_stream_fp8_kernel<64, 2>};
    return launch_wide<Format::kFp8>(kWide, product, first_token, tokens, stream);
  }
  constexpr StreamKernels kKernels{stream_fp8_kernel<1>, stream_fp8_kernel<2>, stream_fp8_kernel<4>,
                                   stream_fp8_kernel<8>};
  return launch_stream<Format::kFp8>(kKernels, product, first_token, tokens, stream);
}

}  // namespace dsv4

// E4M3 weights with a UE8M0 scale for each 128 x 128 block, bf16 activations: weights become bf16 in registers, so that
// they are read from memory as they are stored and a product has the bits of linear_dense with the converted weight (if
// k is a multiple of 1024, where both are cut alike).
// See stream.cuh, and wide_w8a16.cuh for 9 to 64 tokens on Hopper, for what a CTA owns and what bounds it.
#include "gemm/stream.cuh"
#include "gemm/wide_w8a16.cuh"

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
__global__ void __launch_bounds__(kThreads, (WideW8a16Shape<kTokens, kTiles>::kCtasOfAnSm))
    wide_stream_w8a16_kernel(const __grid_constant__ Stream plan) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  WideW8a16Product<kTokens, kTiles> product(plan, shared);
  product.prefetch();
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  product.run();
#endif
}

bool has_wgmma() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}

cudaError_t launch_wide(const Product& product, int64_t first_token, int tokens, cudaStream_t stream) {
  const auto launch = [&]<int kTokens, int kTiles>(WideW8a16Shape<kTokens, kTiles>) {
    return launch_wide_w8a16<kTokens, kTiles>(wide_stream_w8a16_kernel<kTokens, kTiles>, product, first_token, tokens,
                                              stream);
  };
  if (tokens <= 16) return launch(WideW8a16Shape<16, 1>());
  if (tokens <= 32) {
    // Two small CTAs an SM, or a large one.
    const bool two_fit = whole_range_bytes_w8a16<32, 1>(product) <= kMostOfTwo;
    return two_fit ? launch(WideW8a16Shape<32, 1>()) : launch(WideW8a16Shape<32, 2>());
  }
  // CTAs of half the rows where whole ones would leave more than half of the SMs idle.
  const int64_t ctas = ceil_divide(product.rows, WideW8a16Shape<64, 2>::kRowsOfCta) * product.groups *
                       ranges_of(Format::kW8a16, product);
  return 2 * ctas <= kSms ? launch(WideW8a16Shape<64, 1>()) : launch(WideW8a16Shape<64, 2>());
}

}  // namespace

cudaError_t launch_stream_w8a16(const Product& product, int64_t first_token, int tokens, cudaStream_t stream) {
  constexpr Format kFormat = Format::kW8a16;
  if (tokens <= 8) return launch_stream<kFormat, 1>(stream_w8a16_kernel<1>, product, first_token, tokens, stream);
  if (has_wgmma()) return launch_wide(product, first_token, tokens, stream);
  if (tokens <= 16) return launch_stream<kFormat, 2>(stream_w8a16_kernel<2>, product, first_token, tokens, stream);
  if (tokens <= 32) return launch_stream<kFormat, 4>(stream_w8a16_kernel<4>, product, first_token, tokens, stream);
  return launch_stream<kFormat, 8>(stream_w8a16_kernel<8>, product, first_token, tokens, stream);
}

}  // namespace dsv4

// E4M3 weights with a scale (UE8M0 or fp32) for each 128 x 128 block, E4M3 activations with a UE8M0 scale for each
// group of 32, 64 or 128: the sum of a group is scaled and added in fp32.
// See stream.cuh, and wide_stream.cuh for 9 to 64 tokens on Hopper, for what a CTA owns and what bounds it.
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
  WideProduct<kTokens, kTiles> product(plan, shared);
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

cudaError_t launch_wide_fp8(const Product& product, int64_t first_token, int tokens, cudaStream_t stream) {
  if (tokens <= 16) return launch_wide<16, 1>(wide_stream_fp8_kernel<16, 1>, product, first_token, tokens, stream);
  if (tokens <= 32) {
    // Two small CTAs an SM, or a large one.
    return whole_range_bytes<32, 1>(product) <= kMostOfTwo
               ? launch_wide<32, 1>(wide_stream_fp8_kernel<32, 1>, product, first_token, tokens, stream)
               : launch_wide<32, 2>(wide_stream_fp8_kernel<32, 2>, product, first_token, tokens, stream);
  }
  // CTAs of half the rows where whole ones would leave more than half of the SMs idle.
  const int64_t ctas = ceil_divide(product.rows, WideShape<64, 2>::kRowsOfCta) * product.groups *
                       ranges_of(Format::kFp8, product);
  if (2 * ctas <= kSms) return launch_wide<64, 1>(wide_stream_fp8_kernel<64, 1>, product, first_token, tokens, stream);
  return launch_wide<64, 2>(wide_stream_fp8_kernel<64, 2>, product, first_token, tokens, stream);
}

}  // namespace

cudaError_t launch_stream_fp8(const Product& product, int64_t first_token, int tokens, cudaStream_t stream) {
  constexpr Format kFormat = Format::kFp8;
  if (tokens <= 8) return launch_stream<kFormat, 1>(stream_fp8_kernel<1>, product, first_token, tokens, stream);
  if (has_wgmma()) return launch_wide_fp8(product, first_token, tokens, stream);
  if (tokens <= 16) return launch_stream<kFormat, 2>(stream_fp8_kernel<2>, product, first_token, tokens, stream);
  if (tokens <= 32) return launch_stream<kFormat, 4>(stream_fp8_kernel<4>, product, first_token, tokens, stream);
  return launch_stream<kFormat, 8>(stream_fp8_kernel<8>, product, first_token, tokens, stream);
}

}  // namespace dsv4

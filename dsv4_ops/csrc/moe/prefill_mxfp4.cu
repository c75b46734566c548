// Linears with MXFP4 weights, whose x is in bf16 panels, as the step `down`: prefill_product.cuh says how. (Experts
// with such weights: prefill_folded.cu.)
#include "moe/prefill_product.cuh"

namespace dsv4 {
namespace {

constexpr auto kFormat = MoeFormat::kMxfp4;
constexpr auto kStep = PrefillStep::kDown;

__global__ void __launch_bounds__(kProductThreads, 1)
    prefill_mxfp4_kernel(const __grid_constant__ PrefillProduct product, const __grid_constant__ ProductTiles tiles) {
  auto& memory = start_memory<kFormat>();
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  multiply_tiles<kFormat, kStep>(product, tiles, memory);
}

}  // namespace

cudaError_t launch_prefill_mxfp4(const PrefillProduct& product, cudaStream_t stream) {
  return launch_product<kFormat>(prefill_mxfp4_kernel, kStep, product, stream);
}

}  // namespace dsv4

// gate_up and down for FP8 weights: prefill_product.cuh says how.
#include "moe/prefill_product.cuh"

namespace dsv4 {
namespace {

constexpr auto kFormat = MoeFormat::kFp8;

template <PrefillStep kStep>
__global__ void __launch_bounds__(kProductThreads, 1)
    prefill_fp8_kernel(const __grid_constant__ PrefillProduct product, const __grid_constant__ ProductTiles tiles) {
  auto& memory = start_memory<kFormat>();
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  multiply_tiles<kFormat, kStep>(product, tiles, memory);
}

}  // namespace

cudaError_t launch_prefill_fp8(PrefillStep step, const PrefillProduct& product, cudaStream_t stream) {
  const bool gate_up = step == PrefillStep::kGateUp;
  const auto kernel = gate_up ? prefill_fp8_kernel<PrefillStep::kGateUp> : prefill_fp8_kernel<PrefillStep::kDown>;
  return launch_product<kFormat>(kernel, step, product, stream);
}

}  // namespace dsv4

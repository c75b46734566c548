// gate_up and down for MXFP4 weights and x in E4M3: prefill_product.cuh and prefill_fold.cuh say how.
#include "moe/prefill_product.cuh"

namespace dsv4 {
namespace {

constexpr auto kFormat = MoeFormat::kMxfp4Folded;

template <PrefillStep kStep>
__global__ void __launch_bounds__(kProductThreads, 1)
    prefill_folded_kernel(const __grid_constant__ PrefillProduct product, const __grid_constant__ ProductTiles tiles) {
  auto& memory = start_memory<kFormat>();
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  multiply_tiles<kFormat, kStep>(product, tiles, memory);
}

}  // namespace

cudaError_t launch_prefill_folded(PrefillStep step, const PrefillProduct& product, cudaStream_t stream) {
  const bool gate_up = step == PrefillStep::kGateUp;
  const auto kernel = gate_up ? prefill_folded_kernel<PrefillStep::kGateUp> : prefill_folded_kernel<PrefillStep::kDown>;
  return launch_product<kFormat>(kernel, step, product, stream);
}

}  // namespace dsv4

// q_norm_rope: every head divided by its RMS (no weight), then rotated on its last channels, rounded once.
//
// One warp owns one head, or four neighbouring heads of a token from 4096 heads on (norm_rope.cuh); no shared memory.
// Floor: 2 + 2 bytes an element in bf16 at the speed of a copy; at decode sizes the position, then its row of the
// table, are read one after the other while the head is on its way.
#include "norm/norm_rope.cuh"

namespace dsv4 {
namespace {

template <typename T, int kChunks, int kRows>
__global__ void __launch_bounds__(kNormRopeThreads, kCtasOfAnSm<T, kChunks>)
    q_norm_rope_kernel(Heads q, Rope rope, float eps) {
  const HeadsOfWarp own = heads_of_warp<kRows>(q, rope, blockIdx.x * kNormRopeWarps + threadIdx.x / kWarp);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  norm_rope_heads<T, kChunks, kRows>(q, rope, eps, own);
}

}  // namespace

cudaError_t launch_q_norm_rope(const Heads& q, const Rope& rope, float eps, cudaStream_t stream) {
  return with_heads_tactic(q, [&](auto element, auto chunks, auto rows) {
    const Launch at{dim3(ctas_of(warps_of<rows>(q))), dim3(kNormRopeThreads), stream};
    return launch_kernel(q_norm_rope_kernel<decltype(element), chunks, rows>, at, q, rope, eps);
  });
}

}  // namespace dsv4

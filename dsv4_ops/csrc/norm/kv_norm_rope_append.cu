// kv_norm_rope_append: the RMS norm of a token's KV row, its rotation, and the packed entry in the window's ring.
//
// One warp owns the row of one token (norm_rope.cuh); its norm weights are in registers before it waits for the kernel
// that makes the row. No shared memory. Floor: 1 KB read and 584 bytes written a token at D = 512: latency only.
#include "norm/norm_rope.cuh"

namespace dsv4 {
namespace {

template <typename T, int kChunks>
__global__ void __launch_bounds__(kNormRopeThreads) kv_norm_rope_append_kernel(WindowRows kv, Rope rope, float eps) {
  const auto own = window_row_of_warp<kChunks>(kv, rope, blockIdx.x * kNormRopeWarps + threadIdx.x / kWarp);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  norm_rope_append_row<T>(kv, rope, eps, own);
}

}  // namespace

cudaError_t launch_kv_norm_rope_append(const WindowRows& kv, const Rope& rope, float eps, cudaStream_t stream) {
  return with_dtype(kv.dtype, [&](auto element) {
    return with_chunks(kv.dim, [&](auto chunks) {
      const Launch at{dim3(ctas_of(kv.tokens)), dim3(kNormRopeThreads), stream};
      return launch_kernel(kv_norm_rope_append_kernel<decltype(element), chunks>, at, kv, rope, eps);
    });
  });
}

}  // namespace dsv4

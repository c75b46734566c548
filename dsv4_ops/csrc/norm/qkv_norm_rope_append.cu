// qkv_norm_rope_append: q_norm_rope in place and kv_norm_rope_append in one launch.
//
// The first CTAs own the KV rows, a warp each: their chain of dependent steps is the longer one. The others own the
// heads, one a warp, or four from 4096 on (norm_rope.cuh). No shared memory. Floor: 2 + 2 bytes an element of q in
// bf16, 33.5 MB for 128 tokens of 128 heads; at decode sizes the latency of a position, its row of the table, and the
// store.
#include "norm/norm_rope.cuh"

namespace dsv4 {
namespace {

template <typename T, int kChunks, int kRows>
__global__ void __launch_bounds__(kNormRopeThreads, kCtasOfAnSm<T, kChunks>)
    qkv_norm_rope_append_kernel(Heads q, WindowRows kv, Rope rope, float eps, uint32_t window_ctas) {
  const uint32_t warp = threadIdx.x / kWarp;
  if (blockIdx.x < window_ctas) {
    const auto own = window_row_of_warp<kChunks>(kv, rope, blockIdx.x * kNormRopeWarps + warp);
    ptx::wait_for_predecessors();
    ptx::launch_dependents();
    norm_rope_append_row<T>(kv, rope, eps, own);
  } else {
    const auto own = heads_of_warp<kRows>(q, rope, (blockIdx.x - window_ctas) * kNormRopeWarps + warp);
    ptx::wait_for_predecessors();
    ptx::launch_dependents();
    norm_rope_heads<T, kChunks, kRows>(q, rope, eps, own);
  }
}

}  // namespace

cudaError_t launch_qkv_norm_rope_append(const Heads& q, const WindowRows& kv, const Rope& rope, float eps,
                                        cudaStream_t stream) {
  return with_heads_tactic(q, [&](auto element, auto chunks, auto rows) {
    const uint32_t window_ctas = ctas_of(kv.tokens);
    const Launch at{dim3(window_ctas + ctas_of(warps_of<rows>(q))), dim3(kNormRopeThreads), stream};
    return launch_kernel(qkv_norm_rope_append_kernel<decltype(element), chunks, rows>, at, q, kv, rope, eps,
                         window_ctas);
  });
}

}  // namespace dsv4

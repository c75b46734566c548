// sinkhorn: matrices of logits -> doubly stochastic matrices (sinkhorn.cuh).
//
// One thread owns a 4 x 4 matrix, one warp an n x n matrix of another size up to 16. Nothing is shared between
// matrices; for other sizes a warp transposes its matrix once in 1 KiB of shared memory. Time is the chain of 2 *
// iterations - 1 dependent steps; memory, 8 n^2 bytes a matrix, does not matter.
#include "common/launch.cuh"
#include "hyper_connection/sinkhorn.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 64;
constexpr int kWarps = kThreads / kWarp;

__global__ void __launch_bounds__(kThreads)
    sinkhorn_4_kernel(const float* logits, Rows rows, float eps, int iterations, float* comb) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= rows.count / 4) return;
  float matrix[4][4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) matrix[j][k] = logits[(index * 4 + j) * rows.stride + k];
  }
  sinkhorn_4(matrix, eps, iterations);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    reinterpret_cast<float4*>(comb)[index * 4 + j] = {matrix[j][0], matrix[j][1], matrix[j][2], matrix[j][3]};
  }
}

__global__ void __launch_bounds__(kThreads)
    sinkhorn_any_kernel(const float* logits, Rows rows, int n, float eps, int iterations, float* comb) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  __shared__ float scratch[kWarps][kMaxStreams * kMaxStreams];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t index = blockIdx.x * static_cast<int64_t>(kWarps) + warp;
  if (index >= rows.count / n) return;
  float row[kMaxStreams];
#pragma unroll
  for (int k = 0; k < kMaxStreams; ++k) {
    row[k] = lane < n && k < n ? logits[(index * n + lane) * rows.stride + k] : 0.0f;
  }
  sinkhorn_warp(row, n, eps, iterations, scratch[warp]);
#pragma unroll
  for (int k = 0; k < kMaxStreams; ++k) {
    if (lane < n && k < n) comb[(index * n + lane) * n + k] = row[k];
  }
}

}  // namespace

cudaError_t launch_sinkhorn(const float* logits, Rows rows, int n, float eps, int iterations, float* comb,
                            cudaStream_t stream) {
  const int64_t each = n == 4 ? kThreads : kWarps;  // matrices of a CTA
  const Launch at{dim3((rows.count / n + each - 1) / each), dim3(kThreads), stream};
  if (n == 4) return launch_kernel(sinkhorn_4_kernel, at, logits, rows, eps, iterations, comb);
  return launch_kernel(sinkhorn_any_kernel, at, logits, rows, n, eps, iterations, comb);
}

}  // namespace dsv4

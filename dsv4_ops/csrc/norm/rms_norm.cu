// rms_norm: y = rounded(weight * x / rms(x)).
//
// One CTA owns a row, as norm/norm_row.cuh says: weights into registers before the wait, x after it, one barrier for
// the sum of squares, y out. Shared memory: 64 bytes for that sum.
// Floor: with bf16 2 + 2 bytes an element at the speed of a copy; for few rows the latency of a load and a barrier.
#include "norm/norm.h"
#include "norm/norm_row.cuh"

namespace dsv4 {
namespace {

template <int kVectors, int kParts, typename T, typename W>
__global__ void __launch_bounds__(norm_max_threads(kVectors) / kParts, norm_min_ctas<kParts, T, W>(4))
    rms_norm_kernel(const T* x, Rows rows, const W* weight, float eps, T* y) {
  __shared__ alignas(16) float sums[kNormMaxWarps];
  NormRow<kVectors, kParts, T, W> row;
  row.width = static_cast<unsigned>(rows.width);
  row.load_weights(weight);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  row.load(x + blockIdx.x * rows.stride);
  row.normalise(eps, sums);
  y += blockIdx.x * rows.width;
#pragma unroll
  for (int i = 0; i < row.kAll; ++i) {
    if (row.inside(i)) row.values[i].store(y + row.column_of(i));
  }
}

template <typename T, typename W>
__global__ void __launch_bounds__(kNormMaxWarps * kWarp)
    rms_norm_any_kernel(const T* x, Rows rows, const W* weight, float eps, T* y) {
  __shared__ alignas(16) float sums[kNormMaxWarps];
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  norm_any_row(x + blockIdx.x * rows.stride, weight, static_cast<unsigned>(rows.width), eps,
               y + blockIdx.x * rows.width, sums);
}

template <typename T, typename W>
cudaError_t launch(const T* x, Rows rows, const W* weight, float eps, T* y, cudaStream_t stream) {
  const NormTactic tactic = norm_tactic(rows, sizeof(T), {x, weight, y});
  const Launch at{dim3(static_cast<unsigned>(rows.count)), dim3(tactic.warps * kWarp), stream};
  if (!tactic.in_registers) return launch_kernel(rms_norm_any_kernel<T, W>, at, x, rows, weight, eps, y);
  return with_norm_tactic(tactic, [&](auto vectors, auto parts) {
    return launch_kernel(rms_norm_kernel<vectors(), parts(), T, W>, at, x, rows, weight, eps, y);
  });
}

}  // namespace

cudaError_t launch_rms_norm(const void* x, Dtype dtype, Rows rows, const void* weight, Dtype weight_dtype, float eps,
                            void* y, cudaStream_t stream) {
  if (rows.width == 0) return cudaSuccess;
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    return with_dtype(weight_dtype, [&](auto weight_element) {
      const auto* factors = static_cast<const decltype(weight_element)*>(weight);
      return launch(static_cast<const T*>(x), rows, factors, eps, static_cast<T*>(y), stream);
    });
  });
}

}  // namespace dsv4

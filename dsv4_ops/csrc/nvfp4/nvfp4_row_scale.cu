// nvfp4_row_scale: max(amax / 2688, 2^-126) of each row.
//
// A row belongs to a CTA of 8 warps, or to one warp where it has at most 1024 elements. A thread has four loads of 16
// bytes in flight; the row's maximum is exact in any order.
//
// Floor: 2 bytes an element from bf16 at the speed of reading.
#include "common/launch.cuh"
#include "nvfp4/amax.cuh"
#include "nvfp4/nvfp4.h"

namespace dsv4 {
namespace {

constexpr int kWarps = 8;             // of a CTA
constexpr int64_t kWarpWidth = 1024;  // widest row of one warp

template <int kWarpsOfRow, bool kAligned, typename T>
__global__ void __launch_bounds__(kWarps* kWarp) nvfp4_row_scale_kernel(const T* x, Rows rows, float* scale) {
  __shared__ uint32_t scratch[kWarps];
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  constexpr int kThreads = kWarpsOfRow * kWarp, kRows = kWarps / kWarpsOfRow;
  const int64_t row = blockIdx.x * static_cast<int64_t>(kRows) + threadIdx.x / kThreads;
  if (row >= rows.count) return;  // whole warps, and no CTA with a row of its own
  const int thread = threadIdx.x % kThreads;
  const float amax = thread_amax<kThreads, kAligned>(x + row * rows.stride, rows.width, thread);
  const uint32_t bits = max_cta<kWarpsOfRow>(magnitude_bits(amax), scratch);
  if (thread == 0) scale[row] = nvfp4_global_scale(__uint_as_float(bits));
}

template <int kWarpsOfRow, typename T>
cudaError_t launch(const T* x, Rows rows, float* scale, cudaStream_t stream) {
  constexpr int64_t kRows = kWarps / kWarpsOfRow;
  const Launch at{dim3((rows.count + kRows - 1) / kRows), dim3(kWarps * kWarp), stream};
  return has_vectors<T>(x, rows) ? launch_kernel(nvfp4_row_scale_kernel<kWarpsOfRow, true, T>, at, x, rows, scale)
                                 : launch_kernel(nvfp4_row_scale_kernel<kWarpsOfRow, false, T>, at, x, rows, scale);
}

}  // namespace

cudaError_t launch_nvfp4_row_scale(const void* x, Dtype dtype, Rows rows, float* scale, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto element) {
    const auto* values = static_cast<const decltype(element)*>(x);
    return rows.width <= kWarpWidth ? launch<1>(values, rows, scale, stream)
                                    : launch<kWarps>(values, rows, scale, stream);
  });
}

}  // namespace dsv4

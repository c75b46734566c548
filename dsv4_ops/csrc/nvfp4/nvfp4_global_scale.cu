// nvfp4_global_scale: max(amax / 2688, 2^-126) of a whole tensor, left on the device.
//
// The rows are cut into pieces that a CTA of 256 threads loads at once, 16 KiB from bf16. Up to 1024 CTAs take the
// pieces in turn and leave their maxima in the workspace; a second launch of one CTA finds the largest. A tensor of one
// piece needs no second launch. Maxima are exact in any order, so the bits depend on neither.
//
// Floor: 2 bytes an element from bf16 at the speed of reading, and one launch.
#include <algorithm>

#include "common/launch.cuh"
#include "nvfp4/amax.cuh"
#include "nvfp4/nvfp4.h"

namespace dsv4 {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;

template <bool kAligned, typename T>
__global__ void __launch_bounds__(kThreads)
    nvfp4_partial_amax_kernel(const T* x, Rows rows, int64_t pieces_of_row, uint32_t* partials, float* scale) {
  __shared__ uint32_t scratch[kWarps];
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  constexpr int64_t kPiece = kAmaxSpan<kThreads, T>;
  float amax = 0.0f;
  for (int64_t piece = blockIdx.x; piece < rows.count * pieces_of_row; piece += gridDim.x) {
    const int64_t row = piece / pieces_of_row, first = piece % pieces_of_row * kPiece;
    const T* const values = x + row * rows.stride + first;
    const int64_t count = min(kPiece, rows.width - first);
    amax = ptx::max_nan(amax, thread_amax<kThreads, kAligned>(values, count, threadIdx.x));
  }
  const uint32_t bits = max_cta<kWarps>(magnitude_bits(amax), scratch);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    *scale = nvfp4_global_scale(__uint_as_float(bits));
  } else {
    partials[blockIdx.x] = bits;
  }
}

__global__ void __launch_bounds__(kThreads)
    nvfp4_global_scale_kernel(const uint32_t* partials, int count, float* scale) {
  __shared__ uint32_t scratch[kWarps];
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  uint32_t bits = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) bits = max(bits, partials[i]);
  bits = max_cta<kWarps>(bits, scratch);
  if (threadIdx.x == 0) *scale = nvfp4_global_scale(__uint_as_float(bits));
}

template <typename T>
cudaError_t launch(const T* x, Rows rows, uint32_t* partials, float* scale, cudaStream_t stream) {
  constexpr int64_t kPiece = kAmaxSpan<kThreads, T>;
  const int64_t pieces_of_row = (rows.width + kPiece - 1) / kPiece;
  const auto ctas = static_cast<int>(std::clamp<int64_t>(rows.count * pieces_of_row, 1, kMostPartials));
  const Launch at{dim3(ctas), dim3(kThreads), stream};
  const cudaError_t status =
      has_vectors<T>(x, rows)
          ? launch_kernel(nvfp4_partial_amax_kernel<true, T>, at, x, rows, pieces_of_row, partials, scale)
          : launch_kernel(nvfp4_partial_amax_kernel<false, T>, at, x, rows, pieces_of_row, partials, scale);
  if (status != cudaSuccess || ctas == 1) return status;
  return launch_kernel(nvfp4_global_scale_kernel, Launch{dim3(1), dim3(kThreads), stream}, partials, ctas, scale);
}

}  // namespace

cudaError_t launch_nvfp4_global_scale(const void* x, Dtype dtype, Rows rows, uint32_t* partials, float* scale,
                                      cudaStream_t stream) {
  return with_dtype(dtype, [&](auto element) {
    return launch(static_cast<const decltype(element)*>(x), rows, partials, scale, stream);
  });
}

}  // namespace dsv4

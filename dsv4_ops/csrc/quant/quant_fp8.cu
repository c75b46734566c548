// quant_fp8 and quant_fp8_fp32_scale: E4M3 codes and one scale for each group of a row.
//
//   q = e4m3(x / scale),  scale = 2^ceil(log2(max(amax, 1e-4) / 448)) as a UE8M0 byte, or max(amax, 1e-4) / 448 in fp32
//
// A thread owns 8 neighbouring elements, a group lies in 4, 8 or 16 neighbouring lanes; a grid of CTAs of 256 threads
// covers the rows, and no element is read twice.
// Floor: 2 + 1 bytes an element from bf16 (and one or four bytes a group) at the speed of a copy.
#include "common/launch.cuh"
#include "common/quantise.cuh"
#include "common/vector.cuh"
#include "quant/quant.h"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;
constexpr int kCount = 8;  // elements of a thread

template <int kGroup, bool kFp32Scale, typename T>
__global__ void __launch_bounds__(kThreads)
    quant_fp8_kernel(const T* x, Rows rows, uint8_t* q, void* scale) {
  ptx::launch_dependents();
  ptx::wait_for_predecessors();
  const int64_t vectors = rows.width / kCount;  // of a row
  const int64_t vector = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  // Lanes past the end work on the last vector: the shuffles below need whole warps.
  const bool inside = vector < rows.count * vectors;
  const int64_t index = inside ? vector : rows.count * vectors - 1;
  const int64_t row = index / vectors, column = index % vectors * kCount;

  float values[kCount];
  load_floats(x + row * rows.stride + column, values);
  uint8_t codes[kCount];
  const int64_t group = (row * rows.width + column) / kGroup;
  if constexpr (kFp32Scale) {
    const float value = quantise_fp8_fp32_scale<kGroup>(values, codes);
    if (inside && column % kGroup == 0) static_cast<float*>(scale)[group] = value;
  } else {
    const uint32_t byte = quantise_fp8<kGroup>(values, codes);
    if (inside && column % kGroup == 0) static_cast<uint8_t*>(scale)[group] = byte;
  }
  if (inside) store_bytes(q + row * rows.width + column, codes);
}

template <bool kFp32Scale, typename T>
cudaError_t launch(const T* x, Rows rows, int group, uint8_t* q, void* scale, cudaStream_t stream) {
  const int64_t vectors = rows.count * (rows.width / kCount);
  const Launch at{dim3((vectors + kThreads - 1) / kThreads), dim3(kThreads), stream};
  switch (group) {
    case 32: return launch_kernel(quant_fp8_kernel<32, kFp32Scale, T>, at, x, rows, q, scale);
    case 64: return launch_kernel(quant_fp8_kernel<64, kFp32Scale, T>, at, x, rows, q, scale);
    case 128: return launch_kernel(quant_fp8_kernel<128, kFp32Scale, T>, at, x, rows, q, scale);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_quant_fp8(const void* x, Dtype dtype, Rows rows, int group, bool fp32_scale, uint8_t* q, void* scale,
                             cudaStream_t stream) {
  return with_dtype(dtype, [&](auto element) {
    const auto* values = static_cast<const decltype(element)*>(x);
    return fp32_scale ? launch<true>(values, rows, group, q, scale, stream)
                      : launch<false>(values, rows, group, q, scale, stream);
  });
}

}  // namespace dsv4

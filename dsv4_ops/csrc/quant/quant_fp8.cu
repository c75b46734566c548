// quant_fp8 and quant_fp8_fp32_scale: E4M3 codes and one scale for each group of a row.
//
//   q = e4m3(x / scale),  scale = 2^ceil(log2(max(amax, 1e-4) / 448)) as a UE8M0 byte, or max(amax, 1e-4) / 448 in fp32
//
// The rows are cut into vectors of 8 neighbouring elements, numbered through all rows. A CTA takes 512 of them, a
// thread two that lie 256 apart: both are loaded before the first is used, every warp reads and writes whole lines, and
// no element is read twice. A group lies in 4, 8 or 16 neighbouring lanes, which find its amax by shuffles.
//
// Floor: 2 + 1 bytes an element from bf16 (and one or four bytes a group) at the speed of a copy.
#include "common/launch.cuh"
#include "common/quantise.cuh"
#include "common/row_vectors.cuh"
#include "common/vector.cuh"
#include "quant/quant.h"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;  // of a thread
constexpr int kCount = 8;    // elements of a vector

template <int kGroup, bool kFp32Scale, typename T>
__global__ void __launch_bounds__(kThreads) quant_fp8_kernel(RowVectors<T, kCount> x, uint8_t* q, void* scale) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const uint32_t first = blockIdx.x * (kThreads * kVectors) + threadIdx.x;
  Packed<T, kCount> packed[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    // Lanes past the end work on the last vector: a group's amax needs whole warps.
    packed[i].load(x.at(x.place(min(first + i * kThreads, x.count() - 1))));
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const uint32_t vector = first + i * kThreads, group = vector / (kGroup / kCount);
    const bool inside = vector < x.count(), heads_group = inside && vector % (kGroup / kCount) == 0;
    float values[kCount];
    packed[i].to_floats(values);
    uint8_t codes[kCount];
    if constexpr (kFp32Scale) {
      const float value = quantise_fp8_fp32_scale<kGroup>(values, codes);
      if (heads_group) static_cast<float*>(scale)[group] = value;
    } else {
      const uint32_t byte = quantise_fp8<kGroup>(values, codes);
      if (heads_group) static_cast<uint8_t*>(scale)[group] = byte;
    }
    if (inside) store_bytes(q + static_cast<int64_t>(vector) * kCount, codes);
  }
}

template <bool kFp32Scale, typename T>
cudaError_t launch(RowVectors<T, kCount> x, int group, uint8_t* q, void* scale, cudaStream_t stream) {
  const Launch at{dim3(ceil_div(x.count(), kThreads * kVectors)), dim3(kThreads), stream};
  switch (group) {
    case 32:
      return launch_kernel(quant_fp8_kernel<32, kFp32Scale, T>, at, x, q, scale);
    case 64:
      return launch_kernel(quant_fp8_kernel<64, kFp32Scale, T>, at, x, q, scale);
    case 128:
      return launch_kernel(quant_fp8_kernel<128, kFp32Scale, T>, at, x, q, scale);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_quant_fp8(const void* x, Dtype dtype, Rows rows, int group, bool fp32_scale, uint8_t* q, void* scale,
                             cudaStream_t stream) {
  return with_dtype(dtype, [&](auto element) {
    const RowVectors<decltype(element), kCount> vectors(x, rows);
    return fp32_scale ? launch<true>(vectors, group, q, scale, stream)
                      : launch<false>(vectors, group, q, scale, stream);
  });
}

}  // namespace dsv4

// quant_mxfp4: E2M1 codes, two a byte, and one UE8M0 scale for each group of 32 elements.
//
//   q = e2m1(x / scale),  scale = 2^ceil(log2(max(amax, 6 * 2^-126) / 6))
//
// Cut as in quant_fp8: a thread takes two vectors of 8 neighbouring elements that lie 256 apart and loads both before
// it uses the first; a group lies in 4 neighbouring lanes.
//
// Floor: 2 + 1/2 bytes an element from bf16 and one byte a group at the speed of a copy.
#include "common/launch.cuh"
#include "common/quantise.cuh"
#include "common/row_vectors.cuh"
#include "common/vector.cuh"
#include "quant/quant.h"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;          // of a thread
constexpr int kCount = 8;            // elements of a vector
constexpr int kLanes = 32 / kCount;  // of a group

template <typename T>
__global__ void __launch_bounds__(kThreads) quant_mxfp4_kernel(RowVectors<T, kCount> x, uint8_t* q, uint8_t* scale) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const uint32_t first = blockIdx.x * (kThreads * kVectors) + threadIdx.x;
  Packed<T, kCount> loaded[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    // Lanes past the end work on the last vector: a group's amax needs whole warps.
    loaded[i].load(x.at(x.place(min(first + i * kThreads, x.count() - 1))));
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const uint32_t vector = first + i * kThreads;
    float values[kCount];
    loaded[i].to_floats(values);
    uint8_t packed[kCount / 2];
    const uint32_t byte = quantise_mxfp4(values, packed);
    if (vector >= x.count()) continue;
    store_bytes(q + static_cast<int64_t>(vector) * (kCount / 2), packed);
    if (vector % kLanes == 0) scale[vector / kLanes] = byte;
  }
}

}  // namespace

cudaError_t launch_quant_mxfp4(const void* x, Dtype dtype, Rows rows, uint8_t* q, uint8_t* scale, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const RowVectors<T, kCount> vectors(x, rows);
    const Launch at{dim3(ceil_div(vectors.count(), kThreads * kVectors)), dim3(kThreads), stream};
    return launch_kernel(quant_mxfp4_kernel<T>, at, vectors, q, scale);
  });
}

}  // namespace dsv4

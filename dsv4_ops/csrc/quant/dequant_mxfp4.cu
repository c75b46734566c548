// dequant_mxfp4: x = q * scale, pairs of E2M1 codes and the UE8M0 scale of their group of 32 to fp32.
//
// The rows are cut into vectors of 4 neighbouring elements, numbered through all rows: 2 bytes in, 16 out, so that
// every warp reads and writes whole lines. A thread takes four that lie 256 apart and loads all of them first.
//
// Floor: 1/2 + 4 bytes an element and one byte a group at the speed of a copy, most of it writes.
#include "common/launch.cuh"
#include "common/number_formats.cuh"
#include "common/row_vectors.cuh"
#include "common/vector.cuh"
#include "quant/quant.h"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;          // of a thread
constexpr int kCount = 4;            // elements of a vector
constexpr int kGroup = 32 / kCount;  // vectors of a group

__global__ void __launch_bounds__(kThreads)
    dequant_mxfp4_kernel(RowVectors<uint8_t, kCount / 2> q, RowVectors<uint8_t, 1> scales, float* x) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const uint32_t first = blockIdx.x * (kThreads * kVectors) + threadIdx.x;
  uint32_t codes[kVectors], scale[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const auto place = q.place(min(first + i * kThreads, q.count() - 1));
    codes[i] = *reinterpret_cast<const uint16_t*>(q.at(place));
    scale[i] = *scales.at({place.row, place.vector / kGroup});
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const uint32_t vector = first + i * kThreads;
    const float factor = decode_ue8m0(scale[i]);
    float values[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) values[j] = decode_e2m1(codes[i] >> 4 * j) * factor;
    if (vector < q.count()) store_floats(x + static_cast<int64_t>(vector) * kCount, values);
  }
}

}  // namespace

cudaError_t launch_dequant_mxfp4(const uint8_t* q, Rows rows, const uint8_t* scale, Rows scale_rows, float* x,
                                 cudaStream_t stream) {
  const RowVectors<uint8_t, kCount / 2> codes(q, rows);
  const Launch at{dim3(ceil_div(codes.count(), kThreads * kVectors)), dim3(kThreads), stream};
  return launch_kernel(dequant_mxfp4_kernel, at, codes, RowVectors<uint8_t, 1>(scale, scale_rows), x);
}

}  // namespace dsv4

// dequant_fp8: x = q * scale, E4M3 codes and the UE8M0 or fp32 scale of their group to fp32.
//
// The rows are cut into vectors of 4 neighbouring elements, numbered through all rows: 4 bytes in, 16 out, so that
// every warp reads and writes whole lines. A thread takes four that lie 256 apart and loads all of them first.
//
// Floor: 1 + 4 bytes an element at the speed of a copy, most of it writes.
#include "common/launch.cuh"
#include "common/number_formats.cuh"
#include "common/row_vectors.cuh"
#include "common/vector.cuh"
#include "quant/quant.h"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // of a thread
constexpr int kCount = 4;    // elements of a vector

__device__ __forceinline__ float decode_scale(uint8_t scale) { return decode_ue8m0(scale); }
__device__ __forceinline__ float decode_scale(float scale) { return scale; }

// `group` is the number of vectors of a group.
template <typename Scale>
__global__ void __launch_bounds__(kThreads)
    dequant_fp8_kernel(RowVectors<uint8_t, kCount> q, RowVectors<Scale, 1> scales, Divisor group, float* x) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const uint32_t first = blockIdx.x * (kThreads * kVectors) + threadIdx.x;
  uint32_t codes[kVectors];
  Scale scale[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const auto place = q.place(min(first + i * kThreads, q.count() - 1));
    codes[i] = *reinterpret_cast<const uint32_t*>(q.at(place));
    scale[i] = *scales.at({place.row, group.quotient(place.vector)});
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const uint32_t vector = first + i * kThreads;
    const float factor = decode_scale(scale[i]);
    const float2 low = decode_e4m3x2(codes[i]), high = decode_e4m3x2(codes[i] >> 16);
    const float values[kCount] = {low.x * factor, low.y * factor, high.x * factor, high.y * factor};
    if (vector < q.count()) store_floats(x + static_cast<int64_t>(vector) * kCount, values);
  }
}

template <typename Scale>
cudaError_t launch(const uint8_t* q, Rows rows, const void* scale, Rows scale_rows, float* x, cudaStream_t stream) {
  const RowVectors<uint8_t, kCount> codes(q, rows);
  const RowVectors<Scale, 1> scales(scale, scale_rows);
  const Divisor group(scale_rows.width == 0 ? 1 : static_cast<uint32_t>(rows.width / scale_rows.width / kCount));
  const Launch at{dim3(ceil_div(codes.count(), kThreads * kVectors)), dim3(kThreads), stream};
  return launch_kernel(dequant_fp8_kernel<Scale>, at, codes, scales, group, x);
}

}  // namespace

cudaError_t launch_dequant_fp8(const uint8_t* q, Rows rows, const void* scale, Rows scale_rows, bool fp32_scale,
                               float* x, cudaStream_t stream) {
  return fp32_scale ? launch<float>(q, rows, scale, scale_rows, x, stream)
                    : launch<uint8_t>(q, rows, scale, scale_rows, x, stream);
}

}  // namespace dsv4

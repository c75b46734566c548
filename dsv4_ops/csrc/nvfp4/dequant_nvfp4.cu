// dequant_nvfp4 and dequant_nvfp4_128x4: x = (q * scale) * global, pairs of E2M1 codes, an E4M3 scale for each block of
// 16 and a global scale to fp32. The first product is exact.
//
// The rows are cut into vectors of 4 neighbouring elements, numbered through all rows: 2 bytes in, 16 out, so that
// every warp reads and writes whole lines. A thread takes four that lie 256 apart and loads all of them first.
//
// Floor: 1/2 + 1/16 + 4 bytes an element at the speed of a copy, most of it writes.
#include "common/launch.cuh"
#include "common/number_formats.cuh"
#include "common/row_vectors.cuh"
#include "common/vector.cuh"
#include "nvfp4/global_scale.cuh"
#include "nvfp4/layout_128x4.cuh"
#include "nvfp4/nvfp4.h"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;          // of a thread
constexpr int kCount = 4;            // elements of a vector
constexpr int kBlock = 16 / kCount;  // vectors of a block

using Codes = RowVectors<uint8_t, kCount / 2>;

// Where the scale of a block lies in rows of scales.
struct Linear {
  RowVectors<uint8_t, 1> scales;
  __device__ __forceinline__ const uint8_t* at(uint32_t row, uint32_t block) const { return scales.at({row, block}); }
};

// The same in tiles.
struct Tiled {
  const uint8_t* scales;
  uint32_t tiles;  // of a row
  __device__ __forceinline__ const uint8_t* at(uint32_t row, uint32_t block) const {
    return scales + offset_128x4(row, block, tiles);
  }
};

template <typename Layout>
__global__ void __launch_bounds__(kThreads)
    dequant_nvfp4_kernel(Codes q, Layout scales, GlobalScale global_scale, float* x) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const uint32_t first = blockIdx.x * (kThreads * kVectors) + threadIdx.x;
  uint32_t codes[kVectors], scale[kVectors];
  float global[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const auto place = q.place(min(first + i * kThreads, q.count() - 1));
    codes[i] = *reinterpret_cast<const uint16_t*>(q.at(place));
    scale[i] = *scales.at(place.row, place.vector / kBlock);
    global[i] = global_scale.of(place.row);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const uint32_t vector = first + i * kThreads;
    const float factor = decode_e4m3(scale[i]);
    float values[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) values[j] = decode_e2m1(codes[i] >> 4 * j) * factor * global[i];
    if (vector < q.count()) store_floats(x + static_cast<int64_t>(vector) * kCount, values);
  }
}

template <typename Layout>
cudaError_t launch(const uint8_t* q, Rows rows, Layout scales, GlobalScale global_scale, float* x,
                   cudaStream_t stream) {
  const Codes codes(q, rows);
  const Launch at{dim3(ceil_div(codes.count(), kThreads * kVectors)), dim3(kThreads), stream};
  return launch_kernel(dequant_nvfp4_kernel<Layout>, at, codes, scales, global_scale, x);
}

}  // namespace

cudaError_t launch_dequant_nvfp4(const uint8_t* q, Rows rows, const uint8_t* scale, Rows scale_rows,
                                 const float* global_scale, Rows global_rows, float* x, cudaStream_t stream) {
  const Linear scales{RowVectors<uint8_t, 1>(scale, scale_rows)};
  return launch(q, rows, scales, GlobalScale(global_scale, global_rows), x, stream);
}

cudaError_t launch_dequant_nvfp4_128x4(const uint8_t* q, Rows rows, const uint8_t* scale, const float* global_scale,
                                       Rows global_rows, float* x, cudaStream_t stream) {
  const auto blocks = static_cast<uint32_t>(rows.width / (kCount / 2 * kBlock));
  const Tiled scales{scale, ceil_div(blocks, kTileColumns)};
  return launch(q, rows, scales, GlobalScale(global_scale, global_rows), x, stream);
}

}  // namespace dsv4

// quant_nvfp4 and quant_nvfp4_128x4: E2M1 codes and one E4M3 scale for each block of 16 elements, below a global scale.
//
//   scale = e4m3(amax / (6 * global)),  q = e2m1(x / (scale * global)), two codes a byte; a scale of 0 gives codes 0
//
// A thread owns whole blocks, so that lanes exchange nothing. The blocks are numbered through all rows; the grid is as
// large as the GPU holds at once and strides over them, and a thread loads its next block before it quantises the one
// it has: 32 bytes of bf16 in flight for each of 1024 threads of an SM. Neighbouring threads write neighbouring 8 bytes
// of q. In the 128x4 layout the padding is zero: the thread with the last block of a row also writes the row's padding,
// and further CTAs fill the rows that the last tiles lack.
//
// Floor: 2 + 1/2 + 1/16 bytes an element from bf16 at the speed of a copy. That leaves an element less than 20
// instructions, which is why quantise_nvfp4 does not divide.
#include <algorithm>

#include "common/launch.cuh"
#include "common/quantise.cuh"
#include "common/row_vectors.cuh"
#include "common/vector.cuh"
#include "nvfp4/global_scale.cuh"
#include "nvfp4/layout_128x4.cuh"
#include "nvfp4/nvfp4.h"

namespace dsv4 {
namespace {

constexpr int kThreads = 128;
constexpr int kCtasOfSm = 8;
constexpr int kBlock = 16;

// Zeros for the rows that the last tiles lack: one unit a thread and step.
__device__ __forceinline__ void fill_rows(uint8_t* scale, uint32_t rows, uint32_t tiles, uint32_t first,
                                          uint32_t step) {
  uint8_t* const last = scale + static_cast<int64_t>(rows / kTileRows) * tiles * kTileBytes;
  for (uint32_t unit = first; unit < tiles * kUnitRows; unit += step) {
    auto* const words = reinterpret_cast<uint32_t*>(last + static_cast<int64_t>(unit) * kUnitBytes);
#pragma unroll
    for (uint32_t part = 0; part < kTileRows / kUnitRows; ++part) {
      if (part * kUnitRows + unit % kUnitRows >= rows % kTileRows) words[part] = 0;
    }
  }
}

// The first `ctas` CTAs quantise, those after them fill.
template <bool kTiled, typename T>
__global__ void __launch_bounds__(kThreads, kCtasOfSm)
    quant_nvfp4_kernel(RowVectors<T, kBlock> x, uint32_t rows, GlobalScale global_scale, uint32_t ctas, uint8_t* q,
                       uint8_t* scale) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const uint32_t columns = x.of_row(), tiles = ceil_div(columns, kTileColumns);
  if (kTiled && blockIdx.x >= ctas) {
    fill_rows(scale, rows, tiles, (blockIdx.x - ctas) * kThreads + threadIdx.x, (gridDim.x - ctas) * kThreads);
    return;
  }
  const uint32_t step = ctas * kThreads;
  uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= x.count()) return;
  auto place = x.place(index);
  Packed<T, kBlock> loaded;
  loaded.load(x.at(place));
  float loaded_scale = global_scale.of(place.row);
  Nvfp4Global global(loaded_scale);
  while (true) {
    float values[kBlock];
    loaded.to_floats(values);
    if (global_scale.differs()) global = Nvfp4Global(loaded_scale);
    const uint32_t row = place.row, column = place.vector, next = index + step;
    if (next < x.count()) {
      place = x.place(next);
      loaded.load(x.at(place));
      if (global_scale.differs()) loaded_scale = global_scale.of(place.row);
    }
    uint8_t packed[kBlock / 2];
    const uint32_t code = quantise_nvfp4(values, global, packed);
    store_bytes(q + static_cast<int64_t>(index) * (kBlock / 2), packed);
    if constexpr (kTiled) {
      uint8_t* const target = scale + offset_128x4(row, column, tiles);
      *target = code;
      if (column + 1 == columns) {
        for (uint32_t padding = 1; padding < kTileColumns - column % kTileColumns; ++padding) target[padding] = 0;
      }
    } else {
      scale[index] = code;
    }
    if (next >= x.count()) return;
    index = next;
  }
}

template <bool kTiled, typename T>
cudaError_t launch(RowVectors<T, kBlock> x, Rows rows, GlobalScale global_scale, uint8_t* q, uint8_t* scale,
                   cudaStream_t stream) {
  int device = 0, processors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const uint32_t ctas = std::min<uint32_t>(ceil_div(x.count(), kThreads), processors * kCtasOfSm);
  const uint32_t units = ceil_div(static_cast<uint32_t>(rows.width / kBlock), kTileColumns) * kUnitRows;
  const uint32_t filling = kTiled && rows.count % kTileRows != 0 ? ceil_div(units, kThreads) : 0;
  const Launch at{dim3(ctas + filling), dim3(kThreads), stream};
  return launch_kernel(quant_nvfp4_kernel<kTiled, T>, at, x, static_cast<uint32_t>(rows.count), global_scale, ctas, q,
                       scale);
}

}  // namespace

cudaError_t launch_quant_nvfp4(const void* x, Dtype dtype, Rows rows, const float* global_scale, Rows global_rows,
                               bool tiled, uint8_t* q, uint8_t* scale, cudaStream_t stream) {
  const GlobalScale global(global_scale, global_rows);
  return with_dtype(dtype, [&](auto element) {
    const RowVectors<decltype(element), kBlock> blocks(x, rows);
    return tiled ? launch<true>(blocks, rows, global, q, scale, stream)
                 : launch<false>(blocks, rows, global, q, scale, stream);
  });
}

}  // namespace dsv4

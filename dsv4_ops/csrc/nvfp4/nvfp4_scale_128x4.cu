// nvfp4_scale_to_128x4 and nvfp4_scale_from_128x4: block scales [rows, columns] into the 128x4 layout and out of it.
//
// A thread owns one unit of 16 bytes of the layout: four scales in each of four rows that lie 32 apart. Eight
// neighbouring lanes own the units of the same rows in neighbouring tiles, and so read or write 32 neighbouring scales
// of a row together; a CTA covers 8 tiles of one tile row. Scales outside the tensor are written as zeros, and ignored
// where they are read.
//
// Floor: 2 bytes a scale, which is little: the kernel takes the time of a launch.
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "nvfp4/layout_128x4.cuh"
#include "nvfp4/nvfp4.h"

namespace dsv4 {
namespace {

constexpr int kTiles = 8;  // of a CTA
constexpr int kThreads = kTiles * kUnitRows;
constexpr int kParts = kTileRows / kUnitRows;

// The unit of this thread: in the layout, and the row and column of its first scale.
struct Unit {
  int64_t offset;
  int64_t row;
  int64_t column;

  __device__ __forceinline__ explicit Unit(int64_t tiles) {
    const int64_t tile = blockIdx.y * static_cast<int64_t>(kTiles) + threadIdx.x % kTiles;
    const uint32_t unit = threadIdx.x / kTiles;
    offset = (blockIdx.x * tiles + tile) * kTileBytes + unit * kUnitBytes;
    row = blockIdx.x * static_cast<int64_t>(kTileRows) + unit;
    column = tile * kTileColumns;
  }
};

// kAligned: the rows of the linear scales are multiples of 4 bytes and start at them.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads)
    nvfp4_scale_to_128x4_kernel(const uint8_t* scale, Rows rows, uint8_t* layout) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t tiles = (rows.width + kTileColumns - 1) / kTileColumns;
  const Unit unit(tiles);
  if (unit.column >= rows.width) return;
  uint32_t words[kParts] = {};
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int64_t row = unit.row + part * kUnitRows;
    if (row >= rows.count) continue;
    const uint8_t* const from = scale + row * rows.stride + unit.column;
    if constexpr (kAligned) {
      words[part] = *reinterpret_cast<const uint32_t*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < static_cast<int>(kTileColumns); ++i) {
        if (unit.column + i < rows.width) words[part] |= static_cast<uint32_t>(from[i]) << 8 * i;
      }
    }
  }
  *reinterpret_cast<uint4*>(layout + unit.offset) = {words[0], words[1], words[2], words[3]};
}

template <bool kAligned>
__global__ void __launch_bounds__(kThreads)
    nvfp4_scale_from_128x4_kernel(const uint8_t* layout, int64_t rows, int64_t columns, uint8_t* linear) {
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t tiles = (columns + kTileColumns - 1) / kTileColumns;
  const Unit unit(tiles);
  if (unit.column >= columns) return;
  const uint4 loaded = *reinterpret_cast<const uint4*>(layout + unit.offset);
  const uint32_t words[kParts] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int64_t row = unit.row + part * kUnitRows;
    if (row >= rows) continue;
    uint8_t* const to = linear + row * columns + unit.column;
    if constexpr (kAligned) {
      *reinterpret_cast<uint32_t*>(to) = words[part];
    } else {
#pragma unroll
      for (int i = 0; i < static_cast<int>(kTileColumns); ++i) {
        if (unit.column + i < columns) to[i] = words[part] >> 8 * i & 0xFF;
      }
    }
  }
}

Launch grid(int64_t rows, int64_t columns, cudaStream_t stream) {
  constexpr int64_t kColumns = kTiles * kTileColumns;
  const auto down = static_cast<unsigned>((rows + kTileRows - 1) / kTileRows);
  const auto across = static_cast<unsigned>((columns + kColumns - 1) / kColumns);
  return {dim3(down, across), dim3(kThreads), stream};
}

bool aligned(const void* scales, int64_t width, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(scales) | width | stride) % kTileColumns == 0;
}

}  // namespace

cudaError_t launch_nvfp4_scale_to_128x4(const uint8_t* scale, Rows rows, uint8_t* layout, cudaStream_t stream) {
  const Launch at = grid(rows.count, rows.width, stream);
  return aligned(scale, rows.width, rows.stride)
             ? launch_kernel(nvfp4_scale_to_128x4_kernel<true>, at, scale, rows, layout)
             : launch_kernel(nvfp4_scale_to_128x4_kernel<false>, at, scale, rows, layout);
}

cudaError_t launch_nvfp4_scale_from_128x4(const uint8_t* layout, int64_t rows, int64_t columns, uint8_t* linear,
                                          cudaStream_t stream) {
  const Launch at = grid(rows, columns, stream);
  return aligned(linear, columns, columns)
             ? launch_kernel(nvfp4_scale_from_128x4_kernel<true>, at, layout, rows, columns, linear)
             : launch_kernel(nvfp4_scale_from_128x4_kernel<false>, at, layout, rows, columns, linear);
}

}  // namespace dsv4

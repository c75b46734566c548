// The 128x4 layout of NVFP4 block scales, the order in which a tensor core of sm_100 reads them.
//
// Tiles of 128 rows x 4 scales, 512 bytes each, lie one after the other along the rows. Scale (r, c) of a tile is its
// byte (r % 32) * 16 + (r / 32) * 4 + c: a unit of 16 bytes holds four scales of the rows r, r + 32, r + 64 and r + 96.
#pragma once

#include <cstdint>

namespace dsv4 {

constexpr uint32_t kTileRows = 128;
constexpr uint32_t kTileColumns = 4;
constexpr uint32_t kTileBytes = kTileRows * kTileColumns;
constexpr uint32_t kUnitRows = 32;  // rows of a tile that have units of their own
constexpr uint32_t kUnitBytes = 16;

// Byte of the scale at (row, column) where a row has `tiles` tiles.
__device__ __forceinline__ int64_t offset_128x4(uint32_t row, uint32_t column, uint32_t tiles) {
  const int64_t tile = static_cast<int64_t>(row / kTileRows) * tiles + column / kTileColumns;
  const uint32_t unit = row % kUnitRows, part = row % kTileRows / kUnitRows;
  return tile * kTileBytes + unit * kUnitBytes + part * kTileColumns + column % kTileColumns;
}

}  // namespace dsv4

// The ring of pieces of a weight that a warp of a streaming product reads ahead: 16 or 32 rows by 128 bytes a piece.
#pragma once

#include "common/number_formats.cuh"
#include "common/weight_fragments.cuh"
#include "gemm/staged_x.cuh"

namespace dsv4 {

// The pieces of one range of k, of one tile of rows after the other. A stage is kTiles tiles of weight_fragments.cuh
// and, behind them, the FP4 scales [row][group] of their rows; the scale of an FP8 block comes to a register, a piece
// ahead.
template <Format kFormat, int kTiles, int kStages>
class WeightRing {
  static constexpr FormatShape kShape = shape_of(kFormat);
  static constexpr bool kBlockScales = kFormat == Format::kFp8 || kFormat == Format::kW8a16;

 public:
  static constexpr int kRows = kTiles * kTileRows;
  static constexpr int kScaleBytes = kTileRows * kShape.scale_bytes;  // of a tile
  static constexpr int kStageBytes = kTiles * (kTileBytes + kScaleBytes);
  static constexpr int kBytes = kStages * kStageBytes;

  // The ring lies at `offset` in shared memory. Tile i of first_tile .. tile_end begins at row i * tile_stride +
  // first_row of the group; the range is pieces begin .. end.
  __device__ __forceinline__ WeightRing(const Stream& stream, uint8_t* shared, int offset, int lane, int first_tile,
                                        int tile_end, int tile_stride, int first_row, int begin, int end)
      : s(stream),
        p(stream.product),
        shared(shared),
        offset(offset),
        lane(lane),
        tile_end(tile_end),
        tile_stride(tile_stride),
        first_row(first_row),
        group_row(static_cast<int>(blockIdx.z) * static_cast<int>(p.rows)),
        begin(begin),
        end(end),
        stage(offset) {
    start_tile(first_tile);
    start_scales(first_tile);
  }

  // Fill the ring. Weights and scales are parameters: this may run before the kernel waits for its predecessors.
  __device__ __forceinline__ void fill() {
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) copy_next(offset + i * kStageBytes);
    load_block_scale();
  }

  // The stage of the next piece, once it is there; all lanes call, and all call advance when they have read it.
  __device__ __forceinline__ int wait() const {
    ptx::cp_async_wait<kStages - 1>();
    __syncwarp();
    return stage;
  }

  __device__ __forceinline__ void advance() {
    __syncwarp();
    copy_next(stage);
    stage += kStageBytes;
    if (stage == offset + kBytes) stage = offset;
  }

  // The scale of the FP8 block of the next piece; call once a piece.
  __device__ __forceinline__ float take_block_scale() {
    const float scale = has_fp32_scales() ? __uint_as_float(block_scale) : decode_ue8m0(block_scale);
    load_block_scale();
    return scale;
  }

 private:
  __device__ __forceinline__ bool has_fp32_scales() const { return kFormat == Format::kFp8 && p.fp32_weight_scale; }

  __device__ __forceinline__ int row_of(int tile) const { return tile * tile_stride + first_row; }

  // The first piece of a tile is the next to copy.
  __device__ __forceinline__ void start_tile(int tile) {
    next_tile = tile;
    next_piece = begin;
    const int row = row_of(tile);
    next_rows = min(kRows, static_cast<int>(p.rows) - row);
    const int first = group_row + (next_rows > 0 ? row : 0);
    next_source = static_cast<const uint8_t*>(p.weight) +
                  static_cast<int64_t>(first + lane / kTileChunks) * s.row_pitch + begin * kTileRowBytes +
                  lane % kTileChunks * 16;
    if constexpr (kShape.scale_bytes > 0) {
      next_scales = static_cast<const uint8_t*>(p.weight_scale) + first * p.weight_scale_stride +
                    begin * kShape.scale_bytes;
    }
  }

  // Start to copy the next piece, if there is one, to `target`; one group of copies either way.
  __device__ __forceinline__ void copy_next(int target) {
    if (next_tile < tile_end) {
      const bool whole = next_piece < s.whole_pieces && next_rows == kRows;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const uint8_t* const source = next_source + static_cast<int64_t>(m) * kTileRows * s.row_pitch;
        if (whole) {
          copy_whole_tile(shared, target + m * kTileBytes, source, int64_t{4} * s.row_pitch, lane);
        } else {
          copy_tile(shared + target + m * kTileBytes, source, s.row_pitch, next_rows - m * kTileRows,
                    s.row_bytes - next_piece * kTileRowBytes, lane);
        }
      }
      if constexpr (kShape.scale_bytes > 0) {
        copy_scales(shared + target + kTiles * kTileBytes);
        next_scales += kShape.scale_bytes;
      }
      next_source += kTileRowBytes;
      if (++next_piece == end) start_tile(next_tile + 1);
    }
    ptx::cp_async_commit();
  }

  // The FP4 scales of a piece, four bytes a copy.
  __device__ __forceinline__ void copy_scales(uint8_t* target) {
    constexpr int kCopies = kShape.scale_bytes / 4, kRowsAtOnce = 32 / kCopies;  // copies of a row
    constexpr int kGroup = kShape.piece_values / kShape.scale_bytes;
    const int byte = lane % kCopies * 4;
    const bool inside = next_piece * kShape.scale_bytes + byte < static_cast<int>(p.k) / kGroup;
    const uint8_t* source = next_scales + lane / kCopies * p.weight_scale_stride + byte;
#pragma unroll
    for (int row = lane / kCopies; row < kRows; row += kRowsAtOnce) {
      ptx::cp_async_4(target + row * kShape.scale_bytes + byte, source, inside && row < next_rows ? 4 : 0);
      source += kRowsAtOnce * p.weight_scale_stride;
    }
  }

  __device__ __forceinline__ void start_scales(int tile) {
    if constexpr (kBlockScales) {
      scale_tile = tile;
      scale_piece = begin;
      const int block = (group_row + min(row_of(tile), static_cast<int>(p.rows) - 1)) / 128;
      next_scales = static_cast<const uint8_t*>(p.weight_scale) +
                    (block * p.weight_scale_stride + begin) * (has_fp32_scales() ? 4 : 1);
    }
  }

  // The bits of the scale of the next piece.
  __device__ __forceinline__ void load_block_scale() {
    if constexpr (kBlockScales) {
      if (scale_tile >= tile_end) return;
      if (has_fp32_scales()) {
        block_scale = *reinterpret_cast<const uint32_t*>(next_scales);
        next_scales += 4;
      } else {
        block_scale = *next_scales;
        next_scales += 1;
      }
      if (++scale_piece == end) start_scales(scale_tile + 1);
    }
  }

  const Stream& s;
  const Product& p;
  uint8_t* shared;
  int offset, lane, tile_end, tile_stride, first_row, group_row, begin, end;
  int stage;                                 // of the piece that is next to be multiplied with
  int next_tile, next_piece, next_rows;      // the next piece to copy, and how many rows of the tile there are
  const uint8_t *next_source, *next_scales;  // the lane's first 16 bytes of it, and the scales
  int scale_tile, scale_piece;               // the piece whose FP8 scale is loaded next
  uint32_t block_scale;
};

}  // namespace dsv4

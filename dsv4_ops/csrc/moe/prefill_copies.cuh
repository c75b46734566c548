// What the warps of a product share: shared memory, tiles, rings of stages, and the copies of warps 8 .. 11
// (prefill_product.cuh says who does what).
#pragma once

#include "common/divisor.cuh"
#include "common/launch.cuh"
#include "moe/prefill_weights.cuh"

namespace dsv4 {

constexpr int kWarpgroup = 128;
constexpr int kProducers = kWarp * kRowSets;
constexpr int kProductThreads = kConsumers + kProducers;
template <MoeFormat kFormat>
struct ProductRegisters {  // of a thread
  static constexpr int kProducer = WeightShape<kFormat>::kFolded ? 24 : 40;
  static constexpr int kConsumer = WeightShape<kFormat>::kFolded ? 240 : 232;
  static_assert(kProducer + 2 * kConsumer <= ptx::kRegistersOfThreeWarpgroups);
};
constexpr int kPanelBytes = kPrefillBlock * 128;

template <MoeFormat kFormat>
struct ProductMemory {
  using Shape = WeightShape<kFormat>;
  uint8_t panels[Shape::kPanels][kPanelBytes];
  uint8_t staging[2][kPanelBytes];  // one a warpgroup
  uint4 weights[Shape::kStages][kRowSets * Shape::kPieces][kConsumers];
  uint4 scales[Shape::kScaleBuffers > 0 ? Shape::kScaleBuffers : 1][kRowSets * 64];
  union {  // of each warpgroup
    float route[2][kPrefillBlock];
    int pair[2][kPrefillBlock];
  };
  float factor[2][kPrefillBlock];
  float panel_scales[Shape::kFolded ? Shape::kPanels : 1][kPrefillBlock];  // folded: of a panel's rows
  uint64_t full_weights[Shape::kStages], empty_weights[Shape::kStages][2];  // by each warpgroup
  uint64_t full_panels[Shape::kPanels], empty_panels[Shape::kPanels];
};

// Tiles of the launch: the parts of the weights' rows of one block are neighbours, which run at the same time.
static_assert(sizeof(ProductMemory<MoeFormat::kNvfp4>) <= 227 * 1024);
static_assert(sizeof(ProductMemory<MoeFormat::kFp8>) <= 227 * 1024);
static_assert(sizeof(ProductMemory<MoeFormat::kMxfp4Folded>) <= 227 * 1024);

struct ProductTiles {
  Divisor parts;
  int rows_of_part;  // of each matrix
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Stages in turn, with the parity of the current phase.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Folded: the scales of panels, [columns / 128][capacity], lie behind their codes.
__device__ __forceinline__ float* row_scales(uint8_t* panels, int columns, int64_t capacity) {
  return reinterpret_cast<float*>(panels + columns * capacity);
}
__device__ __forceinline__ const float* row_scales(const uint8_t* panels, int columns, int64_t capacity) {
  return reinterpret_cast<const float*>(panels + columns * capacity);
}

struct Tile {
  PrefillBlock block;
  int part;
};

__device__ __forceinline__ int block_count(const PrefillProduct& product) {
  if (product.rows.blocks != nullptr) return product.rows.counts[0];
  return static_cast<int>((product.used_rows + kPrefillBlock - 1) / kPrefillBlock);
}

__device__ __forceinline__ Tile tile_at(const PrefillProduct& product, const ProductTiles& tiles, int index) {
  const int number = tiles.parts.divide(index), part = index - number * static_cast<int>(tiles.parts.value());
  if (product.rows.blocks != nullptr) {
    const int4 words = *reinterpret_cast<const int4*>(product.rows.blocks + number);
    return {{words.x, words.y, words.z, 0}, part};
  }
  const int first = number * kPrefillBlock, left = static_cast<int>(product.used_rows) - first;
  const int rows = (min(left, kPrefillBlock) + kPrefillGrain - 1) / kPrefillGrain * kPrefillGrain;
  return {{0, first, rows, 0}, part};
}

// First weight row of matrix `matrix` in a tile. Where w2 has no second part, the first one is multiplied twice.
template <PrefillStep kStep>
__device__ __forceinline__ int first_row(const PrefillProduct& product, int part, int matrix) {
  if constexpr (kStep == PrefillStep::kGateUp) return part * 128;
  const int row = part * 256 + matrix * 128;
  return row < product.out ? row : part * 256;
}

// Which of 128 weight rows stands at M row 16 * (warp % 4) + 8 * lower + g of the warpgroup warp / 4.
template <MoeFormat kFormat, PrefillStep kStep>
__device__ __forceinline__ int row_of(int warp, int lower, int g) {
  if constexpr (kStep == PrefillStep::kDown) return 16 * warp + 8 * lower + g;
  if constexpr (kFormat == MoeFormat::kMxfp4Folded) {
    return Order<kFormat>::column(warp / 2, 2 * lower + g / 4, warp % 2, g % 4);
  } else {
    return Order<kFormat>::column(warp, g / 2, lower, g % 2);
  }
}

// ---- copies ----

// Scales of the tile's rows of one set, for the stages from `chunk` on.
template <MoeFormat kFormat, PrefillStep kStep>
__device__ __forceinline__ void copy_scales(const PrefillProduct& product, const Tile& tile, int set, uint4* scales,
                                            int chunk) {
  using Shape = WeightShape<kFormat>;
  const int lane = threadIdx.x % kWarp, first = chunk * Shape::kScaleBytes;
  const int bytes = product.k / Shape::kChunk * Shape::kScaleBytes;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row<kStep>(product, tile.part, set / 2) +
                    row_of<kFormat, kStep>(i * 4 + lane / 8, set % 2, lane % 8);
    const auto* const source = static_cast<const uint8_t*>(product.scale[set / 2]) +
                               tile.block.expert * product.scale_expert + row * product.scale_pitch + first;
    auto* const target = reinterpret_cast<uint8_t*>(scales + set * 64 + i * kWarp + lane);
    if (product.scale_pitch % 16 == 0) {
      ptx::cp_async_16(target, source, 16);
    } else {
#pragma unroll
      for (int word = 0; word < 16; word += 4) {
        if (first + word < bytes) ptx::cp_async_4(target + word, source + word, 4);
      }
    }
  }
}

template <MoeFormat kFormat, PrefillStep kStep>
__device__ __forceinline__ void produce(const PrefillProduct& product, const ProductTiles& tiles,
                                        ProductMemory<kFormat>& memory, int tile_count) {
  using Shape = WeightShape<kFormat>;
  const int lane = threadIdx.x % kWarp, set = threadIdx.x / kWarp - kConsumers / kWarp;
  const int lane_row = row_of<kFormat, kStep>(0, set % 2, lane / 4);
  Ring<Shape::kStages> weights;
  Ring<Shape::kPanels> panels;
  int scale_buffer = 0;
  for (int index = blockIdx.x; index < tile_count; index += gridDim.x) {
    const Tile tile = tile_at(product, tiles, index);
    const int64_t row = first_row<kStep>(product, tile.part, set / 2) + lane_row;
    const uint8_t* source = static_cast<const uint8_t*>(product.weight[set / 2]) +
                            tile.block.expert * product.weight_expert + row * product.weight_pitch + lane % 4 * 16;
    const uint8_t* panel = product.panels + static_cast<int64_t>(tile.block.first_row) * 128;
    const float* panel_scales = row_scales(product.panels, product.k, product.rows.capacity) + tile.block.first_row;
    for (int chunk = 0; chunk < product.k / Shape::kChunk; ++chunk) {
      for (uint64_t& empty : memory.empty_weights[weights.stage]) {
        ptx::mbarrier_wait(ptx::shared_address(&empty), weights.parity ^ 1);
      }
#pragma unroll
      for (int warp = 0; warp < kConsumers / kWarp; ++warp) {
        const uint8_t* const row_source = source + row_of<kFormat, kStep>(warp, 0, 0) * product.weight_pitch;
#pragma unroll
        for (int piece = 0; piece < Shape::kPieces; ++piece) {
          ptx::cp_async_16(&memory.weights[weights.stage][set * Shape::kPieces + piece][warp * kWarp + lane],
                           row_source + piece * 64, 16);
        }
      }
      if constexpr (Shape::kFp4) {
        if (chunk % Shape::kScaleSpan == 0) {
          copy_scales<kFormat, kStep>(product, tile, set, memory.scales[scale_buffer], chunk);
          scale_buffer = scale_buffer + 1 == Shape::kScaleBuffers ? 0 : scale_buffer + 1;
        }
      }
      ptx::cp_async_arrive(ptx::shared_address(memory.full_weights + weights.stage));
      weights.advance();
      source += Shape::kRowBytes;
#pragma unroll
      for (int i = 0; i < Shape::kChunk / Shape::kPanelColumns; ++i) {
        if (set == 0 && lane == 0) {
          ptx::mbarrier_wait(ptx::shared_address(memory.empty_panels + panels.stage), panels.parity ^ 1);
          const uint32_t full = ptx::shared_address(memory.full_panels + panels.stage);
          ptx::mbarrier_arrive_expect(full, tile.block.rows * (Shape::kFolded ? 132 : 128));
          if constexpr (Shape::kFolded) {
            ptx::cp_async_bulk(ptx::shared_address(memory.panel_scales[panels.stage]), panel_scales,
                               tile.block.rows * 4, full);
          }
          ptx::cp_async_bulk(ptx::shared_address(memory.panels[panels.stage]), panel, tile.block.rows * 128, full);
        }
        panels.advance();
        panel += product.rows.capacity * 128;
        panel_scales += product.rows.capacity;
      }
      __syncwarp();
    }
  }
}

// ---- barriers and rings of the consumers ----

// Named barriers. A warpgroup has one of its own; the others hand h from the first to the second, which is behind.
constexpr int kWarpgroupBarrier = 1;  // and 2
constexpr int kStagedBarrier = 3;     // the first has its half of h in the staging
constexpr int kTakenBarrier = 4;      // the second has read it

__device__ __forceinline__ void meet(int warpgroup) { ptx::named_barrier(kWarpgroupBarrier + warpgroup, kWarpgroup); }

template <MoeFormat kFormat>
struct Rings {
  Ring<WeightShape<kFormat>::kStages> weights;
  Ring<WeightShape<kFormat>::kPanels> panels;
  int scale_buffer = 0;
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace dsv4

// gate: the router product of bf16 rows with bf16 weights on the tensor cores, then gate_topk.
//
// One order of sums for every number of rows (router.h has the rest of it): a slice of d is 512 columns, 8 chunks of
// 64. A chunk is a chain of 4 m16n8k16 products that starts at zero, weights as the 16-row operand, rows of x as the 8
// columns; a slice is the sum of its chunks from left to right. Columns of a product do not see each other, so a row
// of x has the same bits in any place of any tile.
//
// gate_product_few (up to 64 rows): a CTA owns 16 experts, one slice and 8, 16 or 32 rows; warp w owns chunk w. It
//   has its weights, 64 bytes a lane, in registers before it waits for x: a lane reads 16 bytes at a time, and four
//   lanes exchange them for what the product wants of each. The chunks meet in shared memory (5 KB for 8 rows).
//   Floor: the weights, 2 bytes an element, spread over (E / 16) * (d / 512) CTAs (128 for 256 x 4096), all in flight
//   at once. With more rows x is read from L2 E / 16 times, and the weights once for every 32 rows.
// gate_product_tiles (more rows): a CTA owns a tile of experts and rows, and a part of the slices. Up to 256 rows it is
//   64 x 64 and one slice, 4 warps of 32 x 32; above 128 x 128 and half of the slices, 8 warps of 32 experts x 64 rows.
//   Chunks of both operands, 128 bytes a row, go through a ring of 4 stages (64 and 128 KB), of which the 16-byte unit
//   u of row r lies at u ^ (r % 8), so that ldmatrix meets every bank once.
//   Floor: 2 * rows * E * d flops. Shared memory bounds it about as much as the tensor cores do: with 32 x 64 a warp
//   a product of 4096 flops takes 192 bytes of operands.
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/quad.cuh"
#include "common/reduce.cuh"
#include "router/router.h"

namespace dsv4 {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kChunk = 64;                    // columns of a chain of products
constexpr int kChunks = kSliceBf16 / kChunk;  // of a slice
constexpr int kUnit = 8;                      // columns of 16 bytes
constexpr int kUnits = kChunk / kUnit;        // of a chunk
static_assert(kChunks == kWarps, "gate_product_few: a warp owns a chunk");

struct Operands {
  const bf16* x;
  Rows rows;
  const bf16* weight;
  int64_t weight_stride;
  int experts;
};

// What a lane holds of a chunk of one row: of each 8 columns 2 t and 2 t + 1, four times 8 columns in each half.
struct LaneChunk {
  uint4 half[2];
};

// sums += the products of a chunk: 16 experts (rows g and g + 8 of the tile in low and high) times 8 rows of x.
__device__ __forceinline__ void add_chunk(float (&sums)[4], const LaneChunk& low, const LaneChunk& high,
                                          const LaneChunk& x) {
  float chain[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 &a = low.half[i], &b = high.half[i], &c = x.half[i];
    ptx::mma_m16n8k16_bf16(chain, {a.x, b.x, a.y, b.y}, {c.x, c.y});
    ptx::mma_m16n8k16_bf16(chain, {a.z, b.z, a.w, b.w}, {c.z, c.w});
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] += chain[i];
}

// The lane's part of a row's chunk that starts at `column`, zero past the row's end and where there is no such row: a
// load of 8 neighbouring columns, which exchange() then turns into the lane's.
template <bool kOnce>
__device__ __forceinline__ LaneChunk load_chunk(const bf16* row, bool exists, int64_t column, int64_t width) {
  LaneChunk chunk;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t at = column + (i * 4 + threadIdx.x % 4) * kUnit;
    chunk.half[i] = make_uint4(0, 0, 0, 0);
    if (exists && at < width)
      chunk.half[i] = kOnce ? ptx::load_once(row + at) : *reinterpret_cast<const uint4*>(row + at);
  }
  return chunk;
}

__device__ __forceinline__ void exchange(LaneChunk& chunk) {
#pragma unroll
  for (uint4& half : chunk.half) {
    uint32_t words[4][1] = {{half.x}, {half.y}, {half.z}, {half.w}};
    transpose_quad(words);
    half = make_uint4(words[0][0], words[1][0], words[2][0], words[3][0]);
  }
}

template <int kTiles>
__global__ void __launch_bounds__(kThreads) gate_product_few_kernel(Operands in, float* parts) {
  constexpr int kExperts = 16, kRows = 8 * kTiles, kPadded = kExperts + 4;
  __shared__ float chunks[kWarps][kRows][kPadded];  // padded: the four lanes of a row of the product meet other banks
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int64_t slice = blockIdx.y, column = slice * kSliceBf16 + warp * kChunk;
  const int first_expert = blockIdx.x * kExperts;
  LaneChunk weights[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int expert = first_expert + g + 8 * i;
    weights[i] = load_chunk<true>(in.weight + expert * in.weight_stride, expert < in.experts, column, in.rows.width);
    exchange(weights[i]);
  }
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int64_t first_row = static_cast<int64_t>(blockIdx.z) * kRows;
  LaneChunk x[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int64_t row = first_row + i * 8 + g;
    x[i] = load_chunk<false>(in.x + row * in.rows.stride, row < in.rows.count, column, in.rows.width);
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    exchange(x[i]);
    add_chunk(sums, weights[0], weights[1], x[i]);
#pragma unroll
    for (int j = 0; j < 4; ++j) chunks[warp][i * 8 + 2 * t + j % 2][g + 8 * (j / 2)] = sums[j];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kExperts; i += kThreads) {
    const int expert = first_expert + i % kExperts;
    const int64_t row = first_row + i / kExperts;
    float sum = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) sum += chunks[chunk][i / kExperts][i % kExperts];
    if (row < in.rows.count && expert < in.experts) parts[(row * gridDim.y + slice) * in.experts + expert] = sum;
  }
}

// ---- tiles ----

constexpr int kStages = 4;
constexpr int64_t kFewestTileRows = 64;  // above this many rows

// kWarpsM x kWarpsN warps, each with kM * 16 experts and kN * 8 rows.
template <int kWarpsM, int kWarpsN, int kM, int kN>
struct Tile {
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarp;
  static constexpr int kExperts = kWarpsM * kM * 16, kRows = kWarpsN * kN * 8;
  struct Stage {
    uint4 weight[kExperts][kUnits];
    uint4 x[kRows][kUnits];
  };
};

__device__ __forceinline__ int unit_place(int row, int unit) { return unit ^ (row % kUnits); }

// Starts the copy of one operand's chunk; zeros where there is no such row or column.
template <int kThreads, int kRows>
__device__ __forceinline__ void copy_chunk(uint4 (&tile)[kRows][kUnits], const bf16* base, int64_t stride,
                                           int64_t first_row, int64_t row_end, int64_t column, int64_t width) {
  const int unit = threadIdx.x % kUnits;
#pragma unroll
  for (int i = 0; i < kRows * kUnits / kThreads; ++i) {
    const int row = threadIdx.x / kUnits + i * (kThreads / kUnits);
    const int64_t at = column + unit * kUnit;
    const bool exists = first_row + row < row_end && at < width;
    const bf16* const from = exists ? base + (first_row + row) * stride + at : base;
    ptx::cp_async_16(&tile[row][unit_place(row, unit)], from, exists ? 16 : 0);
  }
}

// Products of a chunk for 16 experts (16 lanes name them) and step of 16 columns.
template <int kRows>
__device__ __forceinline__ void load_weights(uint32_t (&words)[4], const uint4 (&tile)[kRows][kUnits], int expert,
                                             int step) {
  const int lane = threadIdx.x % kWarp, row = expert + lane % 16;
  ptx::ldmatrix_x4(words, &tile[row][unit_place(row, 2 * step + lane / 16)]);
}

// The same for 16 rows of x: words 0 and 1 are the first 8.
template <int kRows>
__device__ __forceinline__ void load_rows(uint32_t (&words)[4], const uint4 (&tile)[kRows][kUnits], int first,
                                          int step) {
  const int lane = threadIdx.x % kWarp, row = first + lane / 16 * 8 + lane % 8;
  ptx::ldmatrix_x4(words, &tile[row][unit_place(row, 2 * step + lane / 8 % 2)]);
}

// Part blockIdx.z has `part_slices` slices, from that many times blockIdx.z on.
template <int kWarpsM, int kWarpsN, int kM, int kN>
__global__ void __launch_bounds__(Tile<kWarpsM, kWarpsN, kM, kN>::kThreads)
    gate_product_tiles_kernel(Operands in, int slices, int part_slices, float* parts) {
  using Cta = Tile<kWarpsM, kWarpsN, kM, kN>;
  constexpr int kSteps = kChunk / 16;
  extern __shared__ __align__(128) uint8_t shared[];
  auto* const stages = reinterpret_cast<typename Cta::Stage*>(shared);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * Cta::kRows;
  const int first_expert = blockIdx.y * Cta::kExperts;
  const int first_slice = blockIdx.z * part_slices;
  const int count = (min(first_slice + part_slices, slices) - first_slice) * kChunks;  // chunks of this part
  const auto copy = [&](int chunk) {
    if (chunk < count) {
      auto& stage = stages[chunk % kStages];
      const int64_t column = static_cast<int64_t>(first_slice) * kSliceBf16 + chunk * kChunk;
      copy_chunk<Cta::kThreads>(stage.weight, in.weight, in.weight_stride, first_expert, in.experts, column,
                                in.rows.width);
      copy_chunk<Cta::kThreads>(stage.x, in.x, in.rows.stride, first_row, in.rows.count, column, in.rows.width);
    }
    ptx::cp_async_commit();  // an empty group past the end, so that the wait below always counts the same
  };

  const int tile_expert = warp % kWarpsM * kM * 16, tile_row = warp / kWarpsM * kN * 8;
  float total[kM][kN][4] = {}, slice[kM][kN][4] = {};
  for (int chunk = 0; chunk < kStages - 1; ++chunk) copy(chunk);
#pragma unroll 1
  for (int chunk = 0; chunk < count; ++chunk) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this chunk is there, and everyone is done with the stage that the next copy overwrites
    copy(chunk + kStages - 1);
    const auto& stage = stages[chunk % kStages];
    uint32_t weights[kM][kSteps][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        load_weights(weights[m][step], stage.weight, tile_expert + m * 16, step);
      }
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      float chains[kM][2][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t x[4];
        load_rows(x, stage.x, tile_row + n * 8, step);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          ptx::mma_m16n8k16_bf16(chains[m][0], weights[m][step], {x[0], x[1]});
          ptx::mma_m16n8k16_bf16(chains[m][1], weights[m][step], {x[2], x[3]});
        }
      }
#pragma unroll
      for (int i = 0; i < kM * 8; ++i) slice[i / 8][n + i / 4 % 2][i % 4] += chains[i / 8][i / 4 % 2][i % 4];
    }
    if (chunk % kChunks != kChunks - 1) continue;
#pragma unroll
    for (int i = 0; i < kM * kN * 4; ++i) {
      total[i / (kN * 4)][i / 4 % kN][i % 4] += slice[i / (kN * 4)][i / 4 % kN][i % 4];
      slice[i / (kN * 4)][i / 4 % kN][i % 4] = 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < kM * kN * 4; ++i) {
    const int m = i / (kN * 4), n = i / 4 % kN, j = i % 4;
    const int expert = first_expert + tile_expert + m * 16 + g + 8 * (j / 2);
    const int64_t row = first_row + tile_row + n * 8 + 2 * t + j % 2;
    if (row < in.rows.count && expert < in.experts) {
      parts[(row * gridDim.z + blockIdx.z) * in.experts + expert] = total[m][n][j];
    }
  }
}

template <int kWarpsM, int kWarpsN, int kM, int kN>
cudaError_t launch_tiles(const Operands& in, int slices, int part_count, float* parts, cudaStream_t stream) {
  using Cta = Tile<kWarpsM, kWarpsN, kM, kN>;
  const dim3 grid((in.rows.count + Cta::kRows - 1) / Cta::kRows, (in.experts + Cta::kExperts - 1) / Cta::kExperts,
                  part_count);
  const Launch at{grid, dim3(Cta::kThreads), stream, kStages * sizeof(typename Cta::Stage)};
  return launch_kernel(gate_product_tiles_kernel<kWarpsM, kWarpsN, kM, kN>, at, in, slices,
                       (slices + part_count - 1) / part_count, parts);
}

template <int kTiles>
cudaError_t launch_few(const Operands& in, int slices, float* parts, cudaStream_t stream) {
  const dim3 grid((in.experts + 15) / 16, slices, (in.rows.count + 8 * kTiles - 1) / (8 * kTiles));
  return launch_kernel(gate_product_few_kernel<kTiles>, {grid, dim3(kThreads), stream}, in, parts);
}

cudaError_t launch_product(const GateProduct& product, float* parts, cudaStream_t stream) {
  const Operands in{static_cast<const bf16*>(product.x), product.rows, static_cast<const bf16*>(product.weight),
                    product.weight_stride, product.experts};
  const int slices = slice_count(product);
  if (in.rows.count <= 8) return launch_few<1>(in, slices, parts, stream);
  if (in.rows.count <= 16) return launch_few<2>(in, slices, parts, stream);
  if (in.rows.count <= kFewestTileRows) return launch_few<4>(in, slices, parts, stream);
  return in.rows.count <= kFewRows ? launch_tiles<2, 2, 2, 4>(in, slices, slices, parts, stream)
                                   : launch_tiles<4, 2, 2, 8>(in, slices, 2, parts, stream);
}

}  // namespace

cudaError_t launch_gate(const GateProduct& product, const GateChoice& choice, float* parts, cudaStream_t stream) {
  const cudaError_t status =
      is_bf16(product) ? launch_product(product, parts, stream) : launch_gate_product_fp32(product, parts, stream);
  if (status != cudaSuccess) return status;
  const int count = part_count(product);
  const int64_t stride = static_cast<int64_t>(count) * product.experts;
  return launch_gate_topk(parts, product.rows.count, stride, count, product.experts, choice, stream);
}

}  // namespace dsv4

// gate: the router product of bf16 rows with bf16 weights on the tensor cores, then gate_topk.
//
// One order of sums for every number of rows (router.h has the rest of it): a slice of d is 512 columns, 8 chunks of
// 64. A chunk is a chain of 4 m16n8k16 products that starts at zero, weights as the 16-row operand, rows of x as the 8
// columns; a slice is the sum of its chunks from left to right. Columns of a product do not see each other, so a row
// of x has the same bits in any place of any tile. Which of a chunk's columns meets which element of the instruction
// is free as long as both operands agree: a lane takes 8 neighbouring columns (16 bytes) of its row, four for each of
// two products.
//
// gate_product_few (up to 256 rows): a CTA owns 16 experts, one slice and 8, 16 or 32 rows; warp w owns chunk w. It
//   has its weights, 64 bytes a lane, in registers before it waits for x. The chunks meet in shared memory (5 KB for 8
//   rows).
//   Floor: the weights, 2 bytes an element, spread over (E / 16) * (d / 512) CTAs (128 for 256 x 4096), all in flight
//   at once. With more rows x is read from L2 E / 16 times, and the weights once for every 32 rows.
// gate_product_many: a CTA owns 128 experts, 128 rows and half of the slices; warp (m, n) of 4 x 2 owns 32 experts and
//   64 rows. Chunks of both operands, 32 KB, go through a ring of 4 stages (128 KB). In odd rows the 16-byte units lie
//   at unit ^ 4, so that the 8 lanes of an access, 4 units of 2 rows, touch all banks.
//   Floor: 2 * rows * E * d flops. Shared memory bounds it before the tensor cores do: an m16n8k16 product, 4096 flops,
//   takes 192 bytes of operands.
#include <cuda_pipeline_primitives.h>

#include "common/launch.cuh"
#include "common/ptx.cuh"
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

// What a lane holds of a chunk of one row: columns 8 t .. 8 t + 7 of both halves.
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

// The lane's part of a row's chunk that starts at `column`, zero past the row's end and where there is no such row.
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

// ---- many rows ----

constexpr int kTile = 128;  // experts and rows of a CTA
constexpr int kStages = 4;
constexpr int kWarpExperts = 32, kWarpRows = 64;

struct Stage {
  uint4 weight[kTile][kUnits];
  uint4 x[kTile][kUnits];
};

__device__ __forceinline__ int unit_place(int row, int unit) { return unit ^ (row % 2 * 4); }

// Starts the copy of one operand's chunk; zeros where there is no such row or column.
__device__ __forceinline__ void copy_chunk(uint4 (&tile)[kTile][kUnits], const bf16* base, int64_t stride,
                                           int64_t first_row, int64_t row_end, int64_t column, int64_t width) {
  const int unit = threadIdx.x % kUnits;
#pragma unroll
  for (int i = 0; i < kTile * kUnits / kThreads; ++i) {
    const int row = threadIdx.x / kUnits + i * (kThreads / kUnits);
    const int64_t at = column + unit * kUnit;
    const bool exists = first_row + row < row_end && at < width;
    const bf16* const from = exists ? base + (first_row + row) * stride + at : base;
    __pipeline_memcpy_async(&tile[row][unit_place(row, unit)], from, sizeof(uint4), exists ? 0 : sizeof(uint4));
  }
}

__device__ __forceinline__ LaneChunk lane_chunk(const uint4 (&tile)[kTile][kUnits], int row) {
  const int t = threadIdx.x % 4;
  return {{tile[row][unit_place(row, t)], tile[row][unit_place(row, 4 + t)]}};
}

__global__ void __launch_bounds__(kThreads, 1) gate_product_many_kernel(Operands in, int slices, float* parts) {
  extern __shared__ __align__(128) uint8_t shared[];
  Stage* const stages = reinterpret_cast<Stage*>(shared);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const int first_expert = blockIdx.y * kTile, half = blockIdx.z;
  const int middle = (slices + 1) / 2, first_slice = half == 0 ? 0 : middle;
  const int count = ((half == 0 ? middle : slices) - first_slice) * kChunks;  // chunks of this half
  const auto copy = [&](int chunk) {
    if (chunk < count) {
      Stage& stage = stages[chunk % kStages];
      const int64_t column = static_cast<int64_t>(first_slice) * kSliceBf16 + chunk * kChunk;
      copy_chunk(stage.weight, in.weight, in.weight_stride, first_expert, in.experts, column, in.rows.width);
      copy_chunk(stage.x, in.x, in.rows.stride, first_row, in.rows.count, column, in.rows.width);
    }
    __pipeline_commit();  // an empty group past the end, so that the wait below always counts the same
  };

  constexpr int kM = kWarpExperts / 16, kN = kWarpRows / 8;
  const int tile_expert = warp % 4 * kWarpExperts, tile_row = warp / 4 * kWarpRows;
  float total[kM][kN][4] = {}, slice[kM][kN][4] = {};
  for (int chunk = 0; chunk < kStages - 1; ++chunk) copy(chunk);
  for (int chunk = 0; chunk < count; ++chunk) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();  // this chunk is there, and everyone is done with the stage that the next copy overwrites
    copy(chunk + kStages - 1);
    const Stage& stage = stages[chunk % kStages];
    LaneChunk weights[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) weights[m][i] = lane_chunk(stage.weight, tile_expert + m * 16 + i * 8 + g);
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const LaneChunk x = lane_chunk(stage.x, tile_row + n * 8 + g);
#pragma unroll
      for (int m = 0; m < kM; ++m) add_chunk(slice[m][n], weights[m][0], weights[m][1], x);
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
    if (row < in.rows.count && expert < in.experts) parts[(row * 2 + half) * in.experts + expert] = total[m][n][j];
  }
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
  if (in.rows.count <= kFewRows) return launch_few<4>(in, slices, parts, stream);
  const dim3 grid((in.rows.count + kTile - 1) / kTile, (in.experts + kTile - 1) / kTile, 2);
  const Launch at{grid, dim3(kThreads), stream, kStages * sizeof(Stage)};
  return launch_kernel(gate_product_many_kernel, at, in, slices, parts);
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

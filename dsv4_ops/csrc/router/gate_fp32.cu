// The router product of operands that are not both bf16, in fp32 FMAs: what a model computed in fp32 needs.
//
// A CTA owns 64 experts, 64 rows and one part (a slice of 128 columns, or half of the slices where there are many
// rows, see router.h). 32 columns of both operands at a time lie in shared memory (17 KB) as fp32, transposed; the
// next 32 are loaded meanwhile. A thread owns 4 x 4 logits: within a slice one chain of FMAs each, then the slices
// from left to right. The first columns of the weights are loaded before the wait.
// Floor: 4 * E * d bytes of weights for few rows, rows * E * d FMAs for many.
#include "common/launch.cuh"
#include "common/vector.cuh"
#include "router/router.h"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;                           // experts and rows of a CTA
constexpr int kStep = 32;                           // columns in shared memory
constexpr int kColumns = kTile * kStep / kThreads;  // that a thread loads, of one row
constexpr int kPadded = kTile + 4;                  // keeps 16 bytes aligned
static_assert(kSliceFp32 % kStep == 0 && kColumns == 8, "whole steps, 16 bytes of bf16");

template <typename X, typename W>
struct Operands {
  const X* x;
  Rows rows;
  const W* weight;
  int64_t weight_stride;
  int experts;
};

// This thread's columns of a row; zeros where there is no such row or column.
template <typename T>
__device__ __forceinline__ void load_columns(const T* base, int64_t stride, int64_t row, int64_t row_end,
                                             int64_t column, int64_t width, float (&values)[kColumns]) {
  if (row < row_end && column < width) {
    load_floats(base + row * stride + column, values);
  } else {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) values[i] = 0.0f;
  }
}

template <typename X, typename W>
__global__ void __launch_bounds__(kThreads) gate_product_fp32_kernel(Operands<X, W> in, int slices, float* parts) {
  __shared__ alignas(16) float weight_tile[kStep][kPadded];
  __shared__ alignas(16) float x_tile[kStep][kPadded];
  const int part = blockIdx.z, count = gridDim.z;  // of parts
  const int middle = (slices + 1) / 2;
  const int first_slice = count != 2 ? part : part == 0 ? 0 : middle;  // two parts are halves, also of two slices
  const int slice_end = count != 2 ? part + 1 : part == 0 ? middle : slices;
  const int64_t width = in.rows.width;
  const int64_t begin = static_cast<int64_t>(first_slice) * kSliceFp32,
                end = static_cast<int64_t>(slice_end) * kSliceFp32;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const int first_expert = blockIdx.y * kTile;
  // Neighbouring threads load different rows, so that their stores below meet different banks.
  const int loaded_row = threadIdx.x % kTile, loaded_column = threadIdx.x / kTile * kColumns;
  const auto load_weight = [&](int64_t column, float(&values)[kColumns]) {
    load_columns(in.weight, in.weight_stride, first_expert + loaded_row, in.experts, column + loaded_column, width,
                 values);
  };
  const auto load_x = [&](int64_t column, float(&values)[kColumns]) {
    load_columns(in.x, in.rows.stride, first_row + loaded_row, in.rows.count, column + loaded_column, width, values);
  };
  float next_weight[kColumns], next_x[kColumns];
  load_weight(begin, next_weight);
  ptx::wait_for_predecessors();
  ptx::launch_dependents();
  load_x(begin, next_x);

  const int expert = threadIdx.x % 16 * 4, row = threadIdx.x / 16 * 4;  // this thread's, within the tile
  float total[4][4] = {}, slice[4][4] = {};
  for (int64_t column = begin; column < end; column += kStep) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      weight_tile[loaded_column + i][loaded_row] = next_weight[i];
      x_tile[loaded_column + i][loaded_row] = next_x[i];
    }
    __syncthreads();
    if (column + kStep < end) {
      load_weight(column + kStep, next_weight);
      load_x(column + kStep, next_x);
    }
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
      float w[4], x[4];
      load_floats(&weight_tile[k][expert], w);
      load_floats(&x_tile[k][row], x);
#pragma unroll
      for (int i = 0; i < 16; ++i) slice[i / 4][i % 4] = fmaf(w[i % 4], x[i / 4], slice[i / 4][i % 4]);
    }
    if ((column + kStep) % kSliceFp32 != 0) continue;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      total[i / 4][i % 4] += slice[i / 4][i % 4];
      slice[i / 4][i % 4] = 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int64_t to_row = first_row + row + i / 4;
    const int to_expert = first_expert + expert + i % 4;
    if (to_row >= in.rows.count || to_expert >= in.experts) continue;
    parts[(to_row * count + part) * in.experts + to_expert] = total[i / 4][i % 4];
  }
}

template <typename X, typename W>
cudaError_t launch(const GateProduct& p, float* parts, cudaStream_t stream) {
  const Operands<X, W> in{static_cast<const X*>(p.x), p.rows, static_cast<const W*>(p.weight), p.weight_stride,
                          p.experts};
  const dim3 grid((p.rows.count + kTile - 1) / kTile, (p.experts + kTile - 1) / kTile, part_count(p));
  return launch_kernel(gate_product_fp32_kernel<X, W>, {grid, dim3(kThreads), stream}, in, slice_count(p), parts);
}

}  // namespace

cudaError_t launch_gate_product_fp32(const GateProduct& product, float* parts, cudaStream_t stream) {
  using bf16 = __nv_bfloat16;
  if (product.x_dtype == Dtype::kBf16) return launch<bf16, float>(product, parts, stream);
  if (product.weight_dtype == Dtype::kBf16) return launch<float, bf16>(product, parts, stream);
  return launch<float, float>(product, parts, stream);
}

}  // namespace dsv4

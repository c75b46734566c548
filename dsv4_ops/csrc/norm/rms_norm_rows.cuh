// RMS norm of rows, alone and with a quantiser behind it: the kernels of rms_norm and of rms_norm_quant_*.
//
//   y = rounded(weight * x / rms(x)); codes and scales of the rounded y by the policy `Output`
//
// One CTA owns a row. A thread owns 2 (4 above a width of 7168) vectors of 8 elements, blockDim.x vectors apart, and
// keeps them in registers from the only read of x to the only write of y; the number of threads follows from the width,
// 448 for 7168. The weights are loaded before the wait. One barrier for the sum of squares; for NVFP4 a second one for
// the largest magnitude of the row. Shared memory: 64 bytes for each of the two.
//
// With few rows the GPU is empty and the time is that of one CTA, of which quantising is a third. So gridDim.y CTAs
// work on the same row: each computes all of y, and writes and quantises every gridDim.y-th warp's part. Who writes has
// no influence on the bits.
//
// Rows that are not whole vectors, that start anywhere or that are wider than 16384 take rms_norm_any_kernel: the same
// owners, hence the same sums, but element by element, and read again from memory in every phase.
//
// Floor: with bf16 2 + 2 bytes an element and the codes (1 or 1/2 byte) at the speed of a copy.
#pragma once

#include <algorithm>

#include "common/launch.cuh"
#include "common/quantised_row.cuh"
#include "common/reduce.cuh"
#include "common/rms_norm.cuh"
#include "common/vector.cuh"

namespace dsv4 {

constexpr int kNormCount = 8;      // elements of a vector
constexpr int kNormMaxWarps = 16;  // of a CTA
constexpr int kNormFewRows = 32;   // rows that several CTAs share
constexpr int kNormManyRows = 264; // rows from which on a CTA has half the threads: two CTAs for each SM

// Threads of a CTA: 448 threads of 2 vectors hold a row of 7168, 512 of 4 one of 16384.
constexpr int norm_max_threads(int vectors) { return vectors == 2 ? 448 : kNormMaxWarps * kWarp; }

// CTAs that must fit on an SM: with bf16 four of 224 threads, so that some load while others compute.
template <int kParts, typename T, typename W>
constexpr int kNormMinCtas = kParts == 2 && sizeof(T) + sizeof(W) == 4 ? 4 : 1;

template <int kVectors, int kParts, typename T, typename W, typename Output>
__global__ void __launch_bounds__(norm_max_threads(kVectors) / kParts, kNormMinCtas<kParts, T, W>)
    rms_norm_kernel(const T* x, Rows rows, const W* weight, float eps, T* y, Output output) {
  constexpr int kCount = kNormCount;
  constexpr int kAll = kVectors * kParts;  // vectors of a thread: vector i of part p is number i * kParts + p
  __shared__ alignas(16) float sums[kNormMaxWarps];
  __shared__ uint32_t largest[kNormMaxWarps];
  ptx::launch_dependents();
  const auto width = static_cast<unsigned>(rows.width);
  const int64_t row = blockIdx.x;
  x += row * rows.stride;
  y += row * width;
  // Threads past the end of the row work on its last vector and neither add it nor write it.
  const auto column_of = [](int i) { return (threadIdx.x + i * blockDim.x) * kCount; };
  const auto source_of = [&](int i) { return min(column_of(i), width - kCount); };

  Packed<W, kCount> weights[kAll];
#pragma unroll
  for (int i = 0; i < kAll; ++i) weights[i].load(weight + source_of(i));
  ptx::wait_for_predecessors();

  // 1. the row
  Packed<T, kCount> row_part[kAll];
#pragma unroll
  for (int i = 0; i < kAll; ++i) row_part[i].load_once(x + source_of(i));

  // 2. y in its place
  float squares[kParts] = {};
#pragma unroll
  for (int i = 0; i < kAll; ++i) {
    float values[kCount];
    row_part[i].to_floats(values);
    squares[i % kParts] += column_of(i) < width ? sum_of_squares(values) : 0.0f;
  }
  const float scale = inverse_rms(sum_warps<kNormMaxWarps>(squares, sums), width, eps);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kAll; ++i) {
    float values[kCount], factors[kCount];
    row_part[i].to_floats(values);
    weights[i].to_floats(factors);
    scale_by_rms(values, factors, scale);
    row_part[i].round(values);
    if constexpr (Output::kNeedsAmax) {
      row_part[i].to_floats(values);
      bits = max(bits, max_magnitude_bits(values));
    }
  }

  // 3. the scale of the row
  output.begin(row, width);
  if constexpr (Output::kNeedsAmax) {
    output.scale_by(__uint_as_float(max_warps(bits, largest)), threadIdx.x == 0 && blockIdx.y == 0);
  }

  // 4. this CTA's share of y and its codes
  if ((threadIdx.x / kWarp & (gridDim.y - 1)) != blockIdx.y) return;
#pragma unroll
  for (int i = 0; i < kAll; ++i) {
    const bool inside = column_of(i) < width;
    if (inside) row_part[i].store(y + column_of(i));
    if constexpr (Output::kQuantises) {
      float values[kCount];
      row_part[i].to_floats(values);
      output.store(column_of(i), values, inside);
    }
  }
}

template <typename T, typename W, typename Output>
__global__ void __launch_bounds__(kNormMaxWarps * kWarp)
    rms_norm_any_kernel(const T* x, Rows rows, const W* weight, float eps, T* y, Output output) {
  constexpr int kCount = kNormCount;
  __shared__ alignas(16) float sums[kNormMaxWarps];
  __shared__ uint32_t largest[kNormMaxWarps];
  ptx::launch_dependents();
  ptx::wait_for_predecessors();
  const int width = static_cast<int>(rows.width);
  const int64_t row = blockIdx.x;
  x += row * rows.stride;
  y += row * width;
  // function(column): whole warps, the lanes past the end of the row too.
  const auto for_each_vector = [&](auto function) {
    const int step = static_cast<int>(blockDim.x) * kCount;
    for (int first = 0; first < width; first += step) function(first + static_cast<int>(threadIdx.x) * kCount);
  };
  float values[kCount], weights[kCount];

  float sum = 0.0f;
  for_each_vector([&](int column) {
    load_some(x + column, width - column, values);
    sum += sum_of_squares(values);
  });
  const float scale = inverse_rms(sum_warps<kNormMaxWarps>(sum, sums), width, eps);
  uint32_t bits = 0;
  for_each_vector([&](int column) {
    load_some(x + column, width - column, values);
    load_some(weight + column, width - column, weights);
    scale_by_rms(values, weights, scale);
    round_all_to<T>(values);
    if (column < width) bits = max(bits, max_magnitude_bits(values));
    store_some(y + column, width - column, values);
  });
  output.begin(row, width);
  if constexpr (Output::kNeedsAmax) {
    output.scale_by(__uint_as_float(max_warps(bits, largest)), threadIdx.x == 0);
  }
  if constexpr (Output::kQuantises) {
    for_each_vector([&](int column) {
      load_some(y + column, width - column, values);  // what this thread has stored
      output.store(column, values, column < width);
    });
  }
}

template <typename T, typename W, typename Output>
cudaError_t launch_rms_norm_as(const T* x, Rows rows, const W* weight, float eps, T* y, Output output,
                               cudaStream_t stream) {
  if (rows.width == 0) return cudaSuccess;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto aligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
  const int64_t vectors = ceil_div(rows.width, kNormCount);
  const int each = vectors <= 2 * norm_max_threads(2) ? 2 : 4;  // vectors of a thread
  const int warps = static_cast<int>(std::min<int64_t>(ceil_div(vectors, each * kWarp), kNormMaxWarps));
  const bool in_registers = rows.width % kNormCount == 0 && vectors <= each * norm_max_threads(each) && aligned(x) &&
                            aligned(weight) && aligned(y) && rows.stride * sizeof(T) % 16 == 0;
  const bool shared = Output::kQuantises && in_registers && rows.count <= kNormFewRows;
  const unsigned ctas = !shared || warps < 8 ? 1 : warps < 12 ? 2 : 4;  // of a row, a power of two
  const Launch at{dim3(static_cast<unsigned>(rows.count), ctas), dim3(warps * kWarp), stream};
  if (!in_registers) return launch_kernel(rms_norm_any_kernel<T, W, Output>, at, x, rows, weight, eps, y, output);
  if (each == 4) return launch_kernel(rms_norm_kernel<4, 1, T, W, Output>, at, x, rows, weight, eps, y, output);
  if (rows.count < kNormManyRows || warps % 2 != 0) {
    return launch_kernel(rms_norm_kernel<2, 1, T, W, Output>, at, x, rows, weight, eps, y, output);
  }
  const Launch halved{at.grid, dim3(warps / 2 * kWarp), stream};
  return launch_kernel(rms_norm_kernel<2, 2, T, W, Output>, halved, x, rows, weight, eps, y, output);
}

template <typename Output>
cudaError_t launch_rms_norm_rows(const void* x, Dtype dtype, Rows rows, const void* weight, Dtype weight_dtype, float eps,
                                 void* y, Output output, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    return with_dtype(weight_dtype, [&](auto weight_element) {
      using W = decltype(weight_element);
      return launch_rms_norm_as(static_cast<const T*>(x), rows, static_cast<const W*>(weight), eps, static_cast<T*>(y),
                                output, stream);
    });
  });
}

}  // namespace dsv4

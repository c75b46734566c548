// The gated activation of rows, stored or quantised: the kernels of swiglu and of swiglu_quant_*.
//
//   h = rounded(silu(min(gate, limit)) * clamp(up, -limit, limit) * route_weight); h, or its codes, by the policy `Output`
//
// A CTA owns a tile of one row, blockIdx.y the first, and a thread one or two vectors of 8 values of h in it, blockDim.x
// vectors apart: 32 bytes of bf16 to load for each, all before the first is used, and 8, 4 or 16 to store. NVFP4 scales by
// the largest magnitude of the row, so there one CTA owns a row, which it keeps in registers up to a width of 8192 and
// computes twice beyond. No shared memory but 64 bytes for that maximum.
//
// Floor: with bf16 4 bytes an element of h and its codes (1 or 1/2 byte) at the speed of a copy. Next to it lies the rate
// of instructions: 2048 elements cost an SM as long as their bytes if each takes 35 of them, so exp and the quotient
// are approximate (common/swiglu.cuh).
#pragma once

#include <algorithm>

#include "common/launch.cuh"
#include "common/quantised_row.cuh"
#include "common/reduce.cuh"
#include "common/swiglu.cuh"

namespace dsv4 {

constexpr int kGatedCount = 8;                   // values of h in a vector
constexpr int64_t kGatedFewVectors = 1 << 17;    // up to here, one vector a thread: what the SMs hold at once

// Threads of a CTA. Without an amax small CTAs do as well and retire one by one.
template <typename Output>
constexpr int kGatedMaxThreads = Output::kNeedsAmax ? 512 : 256;

template <int kVectors, typename GateUp, typename T, typename Output>
__global__ void __launch_bounds__(kGatedMaxThreads<Output>)
    swiglu_kernel(const T* gate_up, Rows rows, const float* route_weight, float limit, Output output) {
  constexpr int kCount = kGatedCount;
  ptx::launch_dependents();
  ptx::wait_for_predecessors();
  const int width = static_cast<int>(rows.width);
  const int tile = static_cast<int>(blockDim.x) * kVectors * kCount;
  const int64_t row = blockIdx.x;
  const T* const source = gate_up + row * rows.stride;
  const int last = (width - 1) / kCount * kCount;  // column of the vector that lanes past the end of the row work on
  const auto column_of = [](int first, int i) { return first + static_cast<int>(threadIdx.x + i * blockDim.x) * kCount; };

  float h[kVectors][kCount];
  const auto activate = [&](int first) {
    GateUp loaded[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) loaded[i].load(source, width, min(column_of(first, i), last));
    const float weight = route_weight[row];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float gate[kCount], up[kCount];
      loaded[i].to_floats(gate, up);
      swiglu<T>(gate, up, weight, limit, h[i]);
    }
  };
  const auto store = [&](int first) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) output.store(column_of(first, i), h[i], column_of(first, i) < width);
  };

  output.begin(row, width);
  if constexpr (!Output::kNeedsAmax) {
    activate(blockIdx.y * tile);
    store(blockIdx.y * tile);
  } else {
    __shared__ uint32_t largest[kGatedMaxThreads<Output> / kWarp];
    uint32_t bits = 0;
    for (int first = 0; first < width; first += tile) {
      activate(first);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) bits = max(bits, max_magnitude_bits(h[i]));
    }
    output.scale_by(__uint_as_float(max_warps(bits, largest)), threadIdx.x == 0);
    for (int first = 0; first < width; first += tile) {
      if (tile < width) activate(first);
      store(first);
    }
  }
}

template <typename GateUp, typename T, typename Output>
cudaError_t launch_swiglu_rows(const T* gate_up, Rows rows, const float* route_weight, float limit, Output output,
                               cudaStream_t stream) {
  if (rows.width == 0) return cudaSuccess;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t vectors = ceil_div(rows.width, kGatedCount);
  const bool few = rows.count * vectors <= kGatedFewVectors;
  const int each = few ? 1 : 2;  // vectors of a thread
  const int most = Output::kNeedsAmax ? 512 : few ? 128 : 256;
  const int threads = static_cast<int>(std::min<int64_t>(ceil_div(vectors, each * kWarp) * kWarp, most));
  const int64_t tiles = Output::kNeedsAmax ? 1 : ceil_div(vectors, each * threads);
  const Launch at{dim3(static_cast<unsigned>(rows.count), static_cast<unsigned>(tiles)), dim3(threads), stream};
  return few ? launch_kernel(swiglu_kernel<1, GateUp, T, Output>, at, gate_up, rows, route_weight, limit, output)
             : launch_kernel(swiglu_kernel<2, GateUp, T, Output>, at, gate_up, rows, route_weight, limit, output);
}

}  // namespace dsv4
